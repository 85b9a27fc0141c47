r"""Reads and writes megatron-core's IndexedDataset format: token ids, read by sample.

    text.bin    int32 ids of all samples, one after the other
    text.idx    "MMIDIDX\0\0", version 1 (u64), dtype code 4 (u8), samples (u64), documents (u64),
                then lengths (i32 each), byte offsets (i64 each), first samples of documents (i64)

Little-endian. Each sample is a document. megatron's own class gives the same arrays and bytes, as
tests show, but its import would cost every loader process four seconds.
"""

import struct
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triptych.data.dataset.block_hashes import CheckedFile
from triptych.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
_INT32 = 4  # megatron's code of the dtype


class TextFile:
    """The samples of ``text.bin`` and ``text.idx``; opening reads the header only."""

    def __init__(self, index: CheckedFile, ids: CheckedFile) -> None:
        """Opens both files.

        Raises:
            DataError: they are damaged, of another format, or not as long as they say.
        """
        self._index, self._ids = index, ids
        self._num_samples, num_documents = _read_header(index)
        self._offsets_start = HEADER.size + 4 * self._num_samples
        check_size(index.path, self._offsets_start + 8 * (self._num_samples + num_documents))
        self.num_tokens = 0
        """Tokens of all samples together."""
        if self._num_samples:
            last = self._num_samples - 1
            start, length = self._offsets(last, last + 1)[0], self.lengths(last, last + 1)[0]
            self.num_tokens = int(start) // 4 + int(length)
        check_size(ids.path, 4 * self.num_tokens)

    def __len__(self) -> int:
        return self._num_samples

    def lengths(self, start: int, end: int) -> NDArray[np.int32]:
        """Tokens of each sample from ``start`` to before ``end``, (end - start,) int32."""
        base = HEADER.size
        return np.frombuffer(self._index.read(base + 4 * start, base + 4 * end), dtype="<i4")

    def span(self, index: int) -> slice:
        """Where the tokens of a sample lie among those of all.

        Raises:
            DataError: they do not end where those of the next sample begin.
        """
        start, *following = (self._offsets(index, min(index + 2, len(self))) // 4).tolist()
        end = start + int(self.lengths(index, index + 1)[0])
        [next_start] = following or [self.num_tokens]
        if not 0 <= start <= end == next_start:
            raise DataError(
                f"{self._index.path} is damaged: sample {index} is said to be tokens {start} to "
                f"{end}  -> copy it again, or prepare the dataset again"
            )
        return slice(start, end)

    def ids(self, span: slice) -> NDArray[np.int32]:
        """(num_tokens,) int32 ids of a ``span``, read-only.

        Raises:
            DataError: they are not those that were written.
        """
        return np.frombuffer(self._ids.read(4 * span.start, 4 * span.stop), dtype="<i4")

    def _offsets(self, start: int, end: int) -> NDArray[np.int64]:
        base = self._offsets_start
        return np.frombuffer(self._index.read(base + 8 * start, base + 8 * end), dtype="<i8")


class TextWriter:
    """Writes samples as they come; 4 bytes per sample are held in memory."""

    def __init__(self, stem: Path) -> None:
        self._index = stem.with_suffix(".idx")
        self._ids = stem.with_suffix(".bin").open("wb")
        self._lengths = array("i")

    def append(self, ids: NDArray[np.int32]) -> None:
        """Adds one sample of (num_tokens,) int32."""
        self._ids.write(ids.astype("<i4", copy=False).tobytes())
        self._lengths.append(len(ids))

    def close(self) -> None:
        """Completes the ids and writes the index."""
        self._ids.close()
        write_index(self._index, np.array(self._lengths, dtype=np.int32))


def write_index(file: Path, lengths: NDArray[np.int32]) -> None:
    """Writes ``text.idx`` for samples of so many tokens, one after the other."""
    ends = 4 * np.cumsum(lengths, dtype=np.int64)
    num_samples = len(lengths)
    with file.open("wb") as index:
        index.write(HEADER.pack(MAGIC, 1, _INT32, num_samples, num_samples + 1))
        index.write(lengths.astype("<i4").tobytes())
        index.write((ends - 4 * lengths).astype("<i8").tobytes())
        index.write(np.arange(num_samples + 1, dtype="<i8").tobytes())


def read_lengths(file: Path, num_samples: int) -> NDArray[np.int32]:
    """(num_samples,) tokens of each sample of a ``text.idx``."""
    return np.fromfile(file, dtype="<i4", count=num_samples, offset=HEADER.size)


def unpack_header(header: bytes, file: Path) -> tuple[int, int, int, int]:
    """Version, megatron's code of the dtype, and numbers of sequences and of document bounds.

    Raises:
        DataError: the first bytes of ``file`` are not those of an index.
    """
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{file} is not an index in megatron's IndexedDataset format")
    _, version, dtype, num_sequences, num_bounds = HEADER.unpack(header)
    return version, dtype, num_sequences, num_bounds


def check_size(file: Path, expected: int) -> None:
    """Refuses a file that is not as long as it should be: reading it would fail much later."""
    if not file.is_file():
        raise DataError(
            f"{file} is missing  -> prepare the dataset again, or copy all of its files"
        )
    size = file.stat().st_size
    if size != expected:
        raise DataError(
            f"{file} has {size} bytes, its index says {expected}: it was cut or mixed up"
            "  -> copy it again, or prepare the dataset again"
        )


def _read_header(index: CheckedFile) -> tuple[int, int]:
    """Numbers of samples and documents."""
    header = bytes(index.read(0, min(index.size, HEADER.size)))
    version, dtype, num_samples, num_documents = unpack_header(header, index.path)
    if (version, dtype) != (1, _INT32):
        raise DataError(
            f"{index.path} has version {version} and dtype code {dtype}; version 1 and code "
            f"{_INT32} (int32) are read"
        )
    return num_samples, num_documents

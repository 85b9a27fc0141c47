r"""Reads and writes megatron-core's IndexedDataset format: token ids that are memory-mapped.

    text.bin    int32 ids of all samples, one after the other
    text.idx    "MMIDIDX\0\0", version 1 (u64), dtype code 4 (u8), samples (u64), documents (u64),
                then lengths (i32 each), byte offsets (i64 each), first samples of documents (i64)

Little-endian. Each sample is a document. megatron's own class gives the same arrays and bytes, as
tests show, but its import would cost every loader process four seconds.
"""

import struct
from array import array
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from triptych.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INT32 = 4  # megatron's code of the dtype
_T = TypeVar("_T", bound=np.generic)


class TextFile:
    """The samples of ``text.bin`` and ``text.idx``; opening reads the header only."""

    def __init__(self, stem: Path) -> None:
        """Maps ``stem.bin`` and ``stem.idx``.

        Raises:
            DataError: the files are missing, of another format, or not as long as they say.
        """
        self._index = index = stem.with_suffix(".idx")
        ids = stem.with_suffix(".bin")
        num_samples, num_documents = _read_header(index)
        arrays_bytes = num_samples * (4 + 8) + num_documents * 8
        check_size(index, _HEADER.size + arrays_bytes)
        self.lengths = _map(index, np.int32, num_samples, _HEADER.size)
        """(num_samples,) tokens of each sample."""
        self._offsets = _map(index, np.int64, num_samples, _HEADER.size + 4 * num_samples)
        num_tokens = 0
        if num_samples:
            num_tokens = int(self._offsets[-1]) // 4 + int(self.lengths[-1])
        check_size(ids, 4 * num_tokens)
        self._ids = _map(ids, np.int32, num_tokens, 0)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples together."""
        return len(self._ids)

    def span(self, index: int) -> slice:
        """Where the tokens of a sample lie among those of all.

        Raises:
            DataError: they do not end where those of the next sample begin.
        """
        start = int(self._offsets[index]) // 4
        end = start + int(self.lengths[index])
        last = index + 1 == len(self)
        next_start = self.num_tokens if last else int(self._offsets[index + 1]) // 4
        if not 0 <= start <= end == next_start:
            raise DataError(
                f"{self._index} is damaged: sample {index} is said to be tokens {start} to {end}"
                "  -> copy it again, or prepare the dataset again"
            )
        return slice(start, end)

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """(num_tokens,) int32 ids of a sample, a read-only view of the file."""
        return self._ids[self.span(index)]


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
        lengths = np.array(self._lengths, dtype=np.int32)
        ends = 4 * np.cumsum(lengths, dtype=np.int64)
        num_samples = len(lengths)
        with self._index.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, _INT32, num_samples, num_samples + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write((ends - 4 * lengths).astype("<i8").tobytes())
            file.write(np.arange(num_samples + 1, dtype="<i8").tobytes())


def check_size(file: Path, expected: int) -> None:
    """Refuses a file that is not as long as it should be: a mapped file would fail much later."""
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


def _read_header(index: Path) -> tuple[int, int]:
    """Numbers of samples and documents."""
    if not index.is_file():
        raise DataError(
            f"{index} is missing  -> prepare the dataset again, or copy all of its files"
        )
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{index} is not an index in megatron's IndexedDataset format")
    _, version, dtype, num_samples, num_documents = _HEADER.unpack(header)
    if (version, dtype) != (1, _INT32):
        raise DataError(
            f"{index} has version {version} and dtype code {dtype}; version 1 and code {_INT32} "
            "(int32) are read"
        )
    return num_samples, num_documents


def _map(file: Path, dtype: type[_T], count: int, offset: int) -> NDArray[_T]:
    """A read-only view of part of a file; numpy refuses to map nothing."""
    if not count:
        return np.empty(0, dtype=dtype)
    return np.asarray(np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(count,)))

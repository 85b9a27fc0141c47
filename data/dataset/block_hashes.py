"""``sizes/*.blocks``: a hash of every 64 KiB of text, targets and indexes, checked at every read.

    line 1      JSON: which dataset, and the sizes of its files
    from 4096   xxh3-64 of each block, file after file, little-endian

The first process that opens a dataset reads these files whole, compares them with ``dataset.yaml``
and writes the hashes: ``launch/prepare.py`` for what it has just made. Any such file may be
removed: it is made again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from triptych.data.hashed_files import HashedFile, differs
from triptych.data.make_once import read_or_make
from triptych.data.stores.local import HeldFile
from triptych.errors import DataError

BLOCK_BYTES = 1 << 16
"""Reading a sample of text reads this much, twice; the hashes are 1/8192 of what they are of."""
HASHED = ("text.idx", "text.bin", "loss.bin", "media.idx")
"""The files of a dataset that are read in parts. Each medium in a shard has a hash of its own."""
_HEADER_BYTES = 4096
_CHECK_BYTES = 256 * BLOCK_BYTES


class CheckedFile:
    """A file whose bytes are those that were prepared, or an error. Threads and forks share it."""

    def __init__(self, path: Path, size: int, hashes: Callable[[int, int], bytes] | None) -> None:
        """Opens nothing yet.

        Args:
            path: the file.
            size: bytes.
            hashes: of the blocks from a first to before a last one, 8 bytes each; None where there
                are none, as for a file outside a dataset.
        """
        self.path, self.size = path, size
        self._file, self._hashes = HeldFile(path), hashes

    def read(self, start: int, end: int) -> memoryview:
        """The bytes from ``start`` to before ``end``, checked.

        Raises:
            DataError: a block is not what was prepared, or the file has become shorter.
            StorageError: the file cannot be read, and waiting did not help.
        """
        first, last = start // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        base = first * BLOCK_BYTES
        data = memoryview(self._file.read(base, min(last * BLOCK_BYTES, self.size) - base))
        if self._hashes is not None and end > start:
            wanted = np.frombuffer(self._hashes(first, last), dtype="<u8").tolist()
            for number, expected in enumerate(wanted):
                block = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                if xxhash.xxh3_64_intdigest(block) != expected:
                    self._refuse(base + number * BLOCK_BYTES, len(block))
        return data[start - base : end - base]

    def check(self) -> None:
        """Read all of it."""
        for start in range(0, self.size, _CHECK_BYTES):
            self.read(start, min(start + _CHECK_BYTES, self.size))

    def peek(self, start: int, size: int) -> bytes:
        """Some bytes, unchecked: where to look, never what to train on."""
        return self._file.read(start, size)

    def _refuse(self, start: int, size: int) -> None:
        raise DataError(
            f"{self.path} is damaged: its {size} bytes from {start} on are not those that were "
            "prepared, or sizes/*.blocks is damaged  -> launch/prepare.py verify FOLDER; copy the "
            "file again, or remove sizes/ where all files are well"
        )


def open_checked(
    folder: Path, files: Mapping[str, HashedFile], dataset: str, folders: Sequence[Path]
) -> dict[str, CheckedFile]:
    """The files of a dataset that are read in parts, by name.

    Args:
        folder: of the dataset.
        files: what ``dataset.yaml`` knows them by.
        dataset: hash of ``dataset.yaml``.
        folders: where the hashes may be, the first one that can be written preferred. Where none
            can be written, they are made in memory, in every process.

    Raises:
        DataError: the hashes had to be made, and a file is not the one of ``dataset.yaml``.
    """
    of = {name: files[name] for name in HASHED}
    sizes = {name: record.size for name, record in of.items()}
    header = json.dumps({"dataset": dataset, "block_bytes": BLOCK_BYTES, "files": sizes}).encode()
    header = (header + b"\n").ljust(_HEADER_BYTES)
    counts = {name: -(-size // BLOCK_BYTES) for name, size in sizes.items()}

    def read(path: Path) -> Callable[[int, int], bytes] | None:
        try:
            with path.open("rb") as file:
                found = file.read(_HEADER_BYTES)
            is_whole = path.stat().st_size == _HEADER_BYTES + 8 * sum(counts.values())
        except OSError:
            return None
        return HeldFile(path).read if is_whole and found == header else None

    def write(file: BinaryIO) -> None:
        file.write(header)
        for name, record in of.items():
            _write_hashes(folder / name, record, file)

    table = read_or_make([place / f"{dataset}.blocks" for place in folders], read=read, write=write)
    if table is None:
        memory = BytesIO()
        write(memory)
        content = memory.getvalue()

        def table(offset: int, size: int) -> bytes:
            return content[offset : offset + size]

    checked, start = {}, _HEADER_BYTES
    for name, count in counts.items():
        checked[name] = CheckedFile(folder / name, sizes[name], _rows(table, start))
        start += 8 * count
    return checked


def _rows(table: Callable[[int, int], bytes], start: int) -> Callable[[int, int], bytes]:
    """The hashes of one file, which begin at ``start`` of the table."""
    return lambda first, last: table(start + 8 * first, 8 * (last - first))


def _write_hashes(path: Path, record: HashedFile, to: BinaryIO) -> None:
    """One pass over a file, which must be the one that was prepared."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            to.write(xxhash.xxh3_64_intdigest(block).to_bytes(8, "little"))
    if digest.hexdigest() != record.xxh3_128:
        raise DataError(differs(path, digest.hexdigest(), record))

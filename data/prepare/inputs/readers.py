"""Opens an input by its first bytes: JSONL, a JSON array, Parquet, webdataset, IndexedDataset."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from triptych.data.dataset.text_file import MAGIC
from triptych.data.prepare.foreign import HEADS, refuse
from triptych.data.prepare.inputs.indexed_dataset import read_indexed, split_indexed
from triptych.data.prepare.inputs.parquet import read_parquet, split_parquet
from triptych.data.prepare.inputs.raw_sample import FileSegment, RawSample, of_json
from triptych.data.prepare.inputs.tar_pairs import read_tar
from triptych.errors import DataError

CHUNK = 1 << 20
"""Bytes of a JSON array that are read at a time."""


class Container(NamedTuple):
    """A kind of file that holds samples."""

    name: str
    is_it: Callable[[bytes], bool]
    """Of the first 512 bytes."""
    split: Callable[[Path, int], Iterator[FileSegment]]
    """Of a file, into segments of about so many bytes."""
    read: Callable[[FileSegment], Iterator[RawSample]]


def _split_lines(path: Path, num_bytes: int) -> Iterator[FileSegment]:
    start = number = 0
    with path.open("rb") as file:
        while content := file.read(num_bytes):
            content += file.readline()
            end = start + len(content)
            yield FileSegment(str(path), start, end, number, len(content))
            start, number = end, number + content.count(b"\n")


def _read_lines(segment: FileSegment) -> Iterator[RawSample]:
    """Blank lines are left out."""
    path, left = Path(segment.file), segment.end - segment.start
    with path.open("rb") as file:
        file.seek(segment.start)
        for number, content in enumerate(file, start=segment.number + 1):
            if content.strip():
                yield of_json(path, number, content)
            left -= len(content)
            if left <= 0:
                return


def _whole(path: Path, num_bytes: int) -> Iterator[FileSegment]:
    yield FileSegment(str(path), 0, 0, 0, path.stat().st_size)


def _read_array(segment: FileSegment) -> Iterator[RawSample]:
    """Elements as they come, so that a large array is never in memory whole."""
    path = Path(segment.file)
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8") as file:
        rest = file.read(CHUNK).lstrip()[1:]
        number = 0
        while True:
            rest = rest.lstrip(", \t\r\n")
            if rest.startswith("]"):
                return
            try:
                _, end = decode(rest)
            except (ValueError, RecursionError) as error:
                more = file.read(max(CHUNK, len(rest)))
                if not more:
                    raise DataError(
                        f"{path}: element {number + 1} of the array is not JSON: {error}"
                    ) from error
                rest += more
                continue
            number += 1
            yield of_json(path, number, rest[:end].encode("utf-8", "surrogatepass"))
            rest = rest[end:]


INDEXED = Container(
    "IndexedDataset", lambda head: head.startswith(MAGIC), split_indexed, read_indexed
)
CONTAINERS = (
    INDEXED,
    Container("Parquet", lambda head: head.startswith(b"PAR1"), split_parquet, read_parquet),
    Container("webdataset", lambda head: head[257:262] == b"ustar", _whole, read_tar),
    Container("JSON array", lambda head: head.lstrip().startswith(b"["), _whole, _read_array),
    Container("JSONL", lambda head: True, _split_lines, _read_lines),
)
"""The first that fits."""


def container_of(path: Path) -> Container:
    """What a file is, by its first bytes.

    Raises:
        DataError: it is no regular file, cannot be read, or is of a format that is not.
    """
    try:
        if not S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is no regular file  -> write the records into one first")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    refuse(HEADS, head, f"{path} is")
    if path.suffix == ".idx":
        return INDEXED  # also where it is damaged in its head, so that this is what is said
    if path.suffix == ".bin" and path.with_suffix(".idx").exists():
        raise DataError(f"{path} has the ids alone  -> give {path.with_suffix('.idx')}")
    return next(container for container in CONTAINERS if container.is_it(head))


def read_segments(segments: Iterable[FileSegment]) -> Iterator[RawSample]:
    """The samples of some segments in order.

    Raises:
        DataError: a file cannot be read.
    """
    for segment in segments:
        path = Path(segment.file)
        try:
            yield from container_of(path).read(segment)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: {error}") from error

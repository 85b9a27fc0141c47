"""``sizes/*.sizes``: what every sample of a dataset counts, written once and memory-mapped.

    line 1      JSON: what the counts follow from, how many, their summary, and a hash of all that
    from 4096   a row for each sample: num_tokens, num_patches, num_patch_pairs, int64 little-endian

A plan asks for samples in shuffled order, all three counts of each: rows touch one page for it.
What the counts follow from also names the file: ``dataset.yaml`` with the hash of every file, the
limits, the geometry of a patch. So changed data or limits never meet the counts of others; they get
a file of their own. Any such file may be removed: it is made again.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from triptych.data.make_once import read_or_make
from triptych.data.types import Sizes, SizesSummary
from triptych.errors import DataError

_HEADER_BYTES = 4096
_CHUNK = 1 << 18
"""Samples that are counted at a time: bounds the memory of counting."""

Columns = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""num_tokens, num_patches, num_patch_pairs."""
Count = Callable[[int, int], Columns]
"""Counts the samples from a first one to before a last one."""


def open_sizes(
    count: Count, num_samples: int, identity: dict[str, Any], folders: Sequence[Path]
) -> Sizes:
    """The counts of a dataset, from its file; the file is made where there is none.

    Opening reads the header alone. Processes of one node share the pages of the file.

    Args:
        count: asked only where there is no file.
        num_samples: of the dataset.
        identity: all that the counts follow from, in plain values.
        folders: where the file may be, the first one that can be written preferred. Where none can
            be written, the counts are made in memory, in every process.
    """
    name = f"{_hash(identity)}.sizes"
    sizes = read_or_make(
        [folder / name for folder in folders],
        read=lambda path: _read(path, identity, num_samples),
        write=lambda file: _write(file, count, num_samples, identity),
    )
    return sizes_of(*count(0, num_samples)) if sizes is None else sizes


def sizes_of(
    num_tokens: NDArray[np.int64],
    num_patches: NDArray[np.int64],
    num_patch_pairs: NDArray[np.int64],
) -> Sizes:
    """Counts that are in memory, (num_samples,) int64 each, and their summary: two passes."""
    columns = (num_tokens, num_patches, num_patch_pairs)
    return Sizes(*columns, _summary(columns))


def hash_column(column: NDArray[np.int64], *digests: xxhash.xxh3_128) -> None:
    """Feed a column to some hashes, chunk by chunk, as little-endian int64."""
    for start in range(0, len(column), _CHUNK):
        block = np.ascontiguousarray(column[start : start + _CHUNK], dtype="<i8").data
        for digest in digests:
            digest.update(block)


def _summary(columns: Columns) -> SizesSummary:
    digests = [xxhash.xxh3_128() for _ in columns]
    for column, digest in zip(columns, digests, strict=True):
        hash_column(column, digest)
    num_tokens, num_patches, _ = columns
    return SizesSummary(
        least_tokens=int(num_tokens.min(initial=np.iinfo(np.int64).max)),
        most_tokens=int(num_tokens.max(initial=0)),
        most_patches=int(num_patches.max(initial=0)),
        xxh3_128=[digest.hexdigest() for digest in digests],
    )


def _write(file: BinaryIO, count: Count, num_samples: int, identity: dict[str, Any]) -> None:
    """The rows chunk by chunk, then the header, which needs them whole."""
    file.seek(_HEADER_BYTES)
    for start in range(0, num_samples, _CHUNK):
        columns = count(start, min(start + _CHUNK, num_samples))
        file.write(np.stack(columns, axis=1).astype("<i8", copy=False).tobytes())
    file.flush()
    summary = _summary(_map(Path(file.name), num_samples))
    content = _content(identity, num_samples, asdict(summary))
    header = json.dumps({"content": content, "xxh3_128": _hash(content)}).encode() + b"\n"
    assert len(header) <= _HEADER_BYTES
    file.seek(0)
    file.write(header.ljust(_HEADER_BYTES))


def _read(path: Path, identity: dict[str, Any], num_samples: int) -> Sizes | None:
    """None where there is no file, or one that is cut, damaged in its header, or of other data."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
        content = header["content"]
        is_whole = path.stat().st_size == _HEADER_BYTES + 3 * 8 * num_samples
        expected = _content(identity, num_samples, content["summary"])
        if not is_whole or content != expected or header["xxh3_128"] != _hash(content):
            return None
        summary = SizesSummary(**content["summary"])
        check = partial(_check_whole, FileIO(path), size=path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Sizes(*_map(path, num_samples), summary, path, check)


def _content(identity: dict[str, Any], num_samples: int, summary: dict[str, Any]) -> dict[str, Any]:
    """What the header says; files that had columns one after the other lack ``rows``."""
    return {"of": identity, "rows": num_samples, "summary": summary}


def _check_whole(file: FileIO, *, size: int) -> None:
    """Touching what was cut under a map ends the process by SIGBUS, without a word.

    The file is held open: one that is removed under a run stays as it is.
    """
    found = os.fstat(file.fileno()).st_size
    if found < size:
        raise DataError(
            f"{file.name} has {found} bytes of {size}: it was cut under this run"
            "  -> type the command again: it is made anew, and training resumes"
        )


def _map(path: Path, num_samples: int) -> Columns:
    shape = (num_samples, 3)
    table = np.memmap(path, dtype="<i8", mode="r", offset=_HEADER_BYTES, shape=shape)
    num_tokens, num_patches, num_patch_pairs = np.asarray(table).T
    return num_tokens, num_patches, num_patch_pairs


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())

"""Files as they were when somebody wrote down their size and hash: datasets, checkpoints."""

import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

_BLOCK_BYTES = 1 << 24


@dataclass(kw_only=True, frozen=True, slots=True)
class HashedFile:
    """What a file is known by."""

    size: int
    """Bytes."""
    xxh3_128: str
    """Hash of the content, hexadecimal."""


def differs(path: Path, found: str, record: HashedFile) -> str:
    """What is wrong with a file of a dataset whose hash is another than the recorded one."""
    return (
        f"{path} is damaged: its xxh3-128 is {found}, dataset.yaml says {record.xxh3_128}"
        "  -> copy it again"
    )


def hash_file(path: Path, *, sync: bool = False) -> HashedFile:
    """Read a file once; with ``sync``, its bytes are on disk afterwards.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return HashedFile(size=size, xxh3_128=digest.hexdigest())

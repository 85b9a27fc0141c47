"""Writes big files straight from memory to the disk, and hashes them on the way.

Through the page cache a byte is copied once more, to pages that the kernel has to find and clear,
beside training, and that are gone for what is read often. Where a file system knows no direct
writes, and for the last few bytes, the page cache is used.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import xxhash

from triptych.data.hashed_files import HashedFile

WRITE_BYTES = 1 << 24
BLOCK_BYTES = 4096
"""Of a disk: direct writes are of whole blocks."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


def write_hashed(path: Path, content: memoryview, go_on: Callable[[], None]) -> HashedFile:
    """Write a file; its bytes are on disk afterwards, its name may not be.

    Args:
        path: of the file.
        content: bytes; written directly where they begin at a multiple of 512 in memory.
        go_on: called before each ``WRITE_BYTES``; may end it by an error.

    Raises:
        OSError: it cannot be written.
    """
    digest, left = xxhash.xxh3_128(), content
    with path.open("wb", buffering=0) as file:
        write_directly(file, is_wanted=True)
        while len(left) > 0:
            go_on()
            block = left[: min(WRITE_BYTES, _whole_blocks(len(left)) or len(left))]
            num_bytes = write_block(file, block)
            digest.update(block[:num_bytes])
            left = left[num_bytes:]
        os.fsync(file.fileno())
    return HashedFile(size=len(content), xxh3_128=digest.hexdigest())


def write_block(file: IO[bytes], block: memoryview) -> int:
    """Write what the file takes of it, directly if it can be; returns how many bytes that is."""
    try:
        return file.write(block)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    write_directly(file, is_wanted=False)
    return file.write(block)


def write_directly(file: IO[bytes], *, is_wanted: bool) -> None:
    """Pass by the page cache from now on, where the file system can, or no longer."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~_DIRECT
    with contextlib.suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | (_DIRECT if is_wanted else 0))


def _whole_blocks(num_bytes: int) -> int:
    return num_bytes // BLOCK_BYTES * BLOCK_BYTES

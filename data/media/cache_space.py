"""The room of a cache of frames: a limit in bytes that all its processes keep, however they end.

``used`` holds the bytes that entries and partial files take at most, 8 bytes little-endian; its
flock is held while they become more. It is raised before a file grows, and counted anew when
there seems to be no room: so after a kill it is too high for a while, never too low.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

WAIT_S = 60.0
"""How long a process waits for another one, which may be stopped. Below the timeout of a
collective: the ranks of a run wait for each other too."""
LOOK_AGAIN_S = 0.01
KEPT = 0.9
"""Share of the limit that is left when the oldest make way, so that few writes have to look."""
_BLOCK_BYTES = 4096
_FILE = re.compile(r"[0-9a-f]{32}\.(frames|partial)")
"""Names of our files. The folder may be anybody's: nothing else in it is touched."""


class CacheSpace:
    """What entries take on disk. Threads and processes may share it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def reserve(self, file: BinaryIO, num_bytes: int) -> None:
        """Give a file its size on disk, empty; the oldest entries make way.

        Args:
            file: a partial file that the caller has locked.
            num_bytes: that will be written to it.

        Raises:
            OSError: there is no room, or nothing can be written.
        """
        needed = _on_disk(num_bytes)
        if needed > self._max_bytes:
            raise OSError(errno.EFBIG, f"{num_bytes} bytes of frames are above data.cache.max_gb")
        file.truncate(0)
        with self._alone() as used_file:
            content = used_file.read(8)
            used = int.from_bytes(content, "little") if len(content) == 8 else self._max_bytes
            if used + needed > self._max_bytes:
                used = self._make_room(needed)
            used_file.seek(0)
            used_file.write((used + needed).to_bytes(8, "little"))
            used_file.flush()
            os.posix_fallocate(file.fileno(), 0, num_bytes)

    def publish(self, file: BinaryIO, path: Path) -> None:
        """Give a partial file its name; not while files are counted, which could miss it."""
        with self._alone():
            os.replace(file.name, path)

    @contextmanager
    def _alone(self) -> Iterator[BinaryIO]:
        with open_or_make(self._folder / "used") as file:
            lock(file)
            yield file

    def _make_room(self, needed: int) -> int:
        """Count, and remove the oldest where there is no room; returns the bytes that are left."""
        used, entries = 0, []
        for file in os.scandir(self._folder):
            if not _FILE.fullmatch(file.name) or _was_abandoned(file):
                continue
            try:
                known = file.stat()
            except FileNotFoundError:  # its maker has given it up
                continue
            used += _on_disk(known.st_size)
            if file.name.endswith(".frames"):
                entries.append((known.st_mtime_ns, file.path, _on_disk(known.st_size)))
        if used + needed <= self._max_bytes:
            return used
        for _, path, size in sorted(entries):
            if used + needed <= KEPT * self._max_bytes:
                break
            Path(path).unlink(missing_ok=True)  # whoever has it open reads on
            used -= size
        if used + needed > self._max_bytes:
            raise OSError(errno.ENOSPC, "data.cache.max_gb is full of what is being written")
        return used


def open_or_make(path: Path) -> BinaryIO:
    """A file to read and write, not cut."""
    return open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))


def lock(file: BinaryIO) -> None:
    """Hold the file's flock until it is closed, or its process ends.

    Raises:
        TimeoutError: another one has held it for ``WAIT_S``.
        OSError: the file system has no locks.
    """
    until_s = time.monotonic() + WAIT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise TimeoutError(errno.ETIMEDOUT, f"locked for {WAIT_S:g} s") from None
        time.sleep(LOOK_AGAIN_S)


def is_at(file: BinaryIO, path: str | Path) -> bool:
    """Whether an open file is the one of this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _was_abandoned(file: os.DirEntry[str]) -> bool:
    """Whether it is a partial file of a process that was killed; it is removed then."""
    if not file.name.endswith(".partial"):
        return False
    try:
        with open(file.path, "r+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(opened, file.path):
                os.unlink(file.path)
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False


def _on_disk(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES

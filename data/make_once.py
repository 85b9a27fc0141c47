"""Files that any of many processes may need, and that one of them makes."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

_log = logging.getLogger(__name__)
T = TypeVar("T")

NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What flock says on file systems without it: some parallel ones, as they are mounted."""


def read_or_make(
    paths: Sequence[Path],
    *,
    read: Callable[[Path], T | None],
    write: Callable[[BinaryIO], object],
) -> T | None:
    """What a file says; it is made where it is missing or damaged, in the first place that can be.

    Args:
        paths: where the file may be, the best place first.
        read: the content of the file, None where it is missing or damaged.
        write: writes the content; every process would write the same.

    Returns:
        The content; None where no place can be written.
    """
    for path in paths:
        if (content := read(path)) is not None:
            return content
    for path in paths:
        try:
            return _make_once(path, read, write)
        except OSError as error:
            _log.warning("%s cannot be written: %s", path, error.strerror or error)
    return None


def _make_once(
    path: Path, read: Callable[[Path], T | None], write: Callable[[BinaryIO], object]
) -> T | None:
    """Make a file. Processes that come meanwhile wait, and take it.

    It appears when it is complete, so nobody sees a part of it, whoever dies. The lock only saves
    work: where the file system has none, every process makes the file, and the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _turn(path.parent / ".lock") as is_alone:
        if (content := read(path)) is not None:
            return content
        if path.exists():
            _log.warning("%s is damaged: it is made again", path)
        partials = f".{path.name}.partial-"
        if is_alone:
            for leftover in path.parent.glob(f"{partials}*"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
        partial = path.with_name(f"{partials}{socket.gethostname()}-{os.getpid()}")
        try:
            with partial.open("w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return read(path)


@contextlib.contextmanager
def _turn(lock: Path) -> Iterator[bool]:
    """Wait until no other process is inside; False where the file system cannot tell.

    By flock, which ends with its process, however that ends.
    """
    with lock.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            _log.warning("%s: %s; every process does the same work", lock, error.strerror)
            yield False
            return
        yield True

"""Files in a local or parallel file system: shards by name, and a file that stays open."""

import os
from functools import partial
from io import FileIO
from pathlib import Path

from triptych.data.stores.retrying import patiently
from triptych.errors import DataError


class LocalStore:
    """Reads parts of files below a folder. Holds nothing open: threads and forks may share it."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)

    def path(self, name: str) -> str:
        """The file's path."""
        return f"{self._root}/{name}"

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on.

        Raises:
            DataError: the file ends before.
            OSError: the file is missing or unreadable.
        """
        with FileIO(self.path(name)) as file:
            return _read_part(file, offset, size)


class HeldFile:
    """A file that is read in many small parts: opened once, waited for where it cannot be read.

    Not mapped: what is cut or unreadable under a map ends the process by SIGBUS, without a word;
    here it is an error that names the file. Threads and forks may share it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on.

        Raises:
            DataError: the file ends before.
            StorageError: it cannot be read, and waiting did not help.
        """
        return patiently(partial(self._read, offset, size), str(self.path))

    def _read(self, offset: int, size: int) -> bytes:
        file = self._file  # no other thread closes what a name of this one holds
        if file is None:
            file = self._file = FileIO(self.path)
        try:
            return _read_part(file, offset, size)
        except OSError:
            self._file = None  # a handle that has gone stale does not recover
            raise


def _read_part(file: FileIO, offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise DataError(
            f"{file.name} ends at byte {offset + len(data)}, before the {size} bytes from {offset} "
            "on: it was cut  -> copy it again"
        )
    return data

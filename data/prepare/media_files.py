"""The files that records name, read only where they may be.

Records come from elsewhere: a path in one of them may lead to any file of this machine, to a pipe
that nobody writes or to a device without an end.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISREG

from triptych.data.media.kinds import kind_of
from triptych.data.parts import MediaBytes, MediaRef
from triptych.data.prepare.writer import MediaFile, ShardPlace
from triptych.errors import DataError


class MediaFolders:
    """Folders below which every media file lies."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Relative paths start from the first folder."""
        self._start = folders[0]
        self._folders = [folder.resolve() for folder in folders]

    def read(self, items: Sequence[MediaRef]) -> list[MediaFile]:
        """The files of a sample, byte for byte, which decode. Clips of one video share its bytes.

        Raises:
            DataError: it is no regular file below one of the folders, links followed; is too large,
                cannot be read or decoded.
        """
        contents: dict[Path, bytes] = {}
        return [self._read_one(item, contents) for item in items]

    def _read_one(self, item: MediaRef, contents: dict[Path, bytes]) -> MediaFile:
        kind = kind_of(item.kind)
        if isinstance(item.path, MediaBytes):
            return _of_bytes(item, item.path)
        local = item.path.removeprefix("file://")
        if "://" in local:
            raise DataError(
                f"{item.path[:80]!r} is not a path: download {kind.name}s first, and name the files"
            )
        file = self._start / local
        where = f"{kind.name} {file}"
        try:
            if file not in contents:
                contents[file] = self._content(file, kind.max_bytes, where)
        except (OSError, ValueError) as error:
            raise DataError(f"{where} cannot be read: {error}") from error
        extension = _extension(file.name, kind.extension)
        content = contents[file]
        return MediaFile(item.kind, content, extension, kind.measure(content, where, item.clip))

    def _content(self, file: Path, max_bytes: int, where: str) -> bytes:
        target = file.resolve()
        if not any(target.is_relative_to(folder) for folder in self._folders):
            raise DataError(
                f"{where} leads out of the folders of media, to {target}"
                f"  -> if it is meant, name its folder too: --images {self._start} {target.parent}"
            )
        with open(target, "rb", opener=_without_waiting) as opened:
            status = os.fstat(opened.fileno())
            if not S_ISREG(status.st_mode):
                raise DataError(f"{where} cannot be read: it is no regular file")
            if status.st_size > max_bytes:
                raise DataError(
                    f"{where} has {status.st_size} bytes, above the bound of {max_bytes}"
                )
            return opened.read()


def _of_bytes(ref: MediaRef, item: MediaBytes) -> MediaFile:
    """A file that came with its record, which decodes."""
    kind = kind_of(ref.kind)
    where = f"{kind.name} {item.name}".strip()
    size, most = len(item.content), kind.max_bytes
    if size > most:
        raise DataError(f"{where} has {size} bytes, above the bound of {most}")
    place = None if item.file is None else ShardPlace(item.file, item.offset)
    extension = _extension(item.name, kind.extension)
    extent = kind.measure(item.content, where, ref.clip)
    return MediaFile(ref.kind, item.content, extension, extent, place)


def _extension(name: str, otherwise: str) -> str:
    extension = Path(name).suffix.removeprefix(".").lower()
    usable = extension.isascii() and extension.isalnum() and len(extension) <= 8
    return extension if usable else otherwise


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe too, whether or not somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)

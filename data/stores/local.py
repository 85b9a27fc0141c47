"""Media shards in a local or parallel file system."""

from pathlib import Path

from triptych.errors import DataError


class LocalStore:
    """Reads parts of files below a folder. Holds nothing open: threads and forks may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> str:
        """The file's path."""
        return str(self.root / name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on.

        Raises:
            DataError: the file ends before.
            OSError: the file is missing or unreadable.
        """
        path = self.root / name
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise DataError(
                f"{path} ends at byte {offset + len(data)}, before the {size} bytes from {offset} "
                "on: the shard was cut  -> copy it again"
            )
        return data

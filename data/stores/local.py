"""Media shards in a local or parallel file system."""

from pathlib import Path

from triptych.errors import DataError


class LocalStore:
    """Reads parts of files below a folder. Holds nothing open: threads and forks may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on.

        Raises:
            DataError: the file is missing, unreadable, or ends before.
        """
        path = self.root / name
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DataError(
                f"{path} ends at byte {offset + len(data)}, before the {size} bytes from {offset} "
                "on: the shard was cut  -> copy it again"
            )
        return data

"""Media shards in a local or parallel file system."""

import time
from pathlib import Path

from triptych.errors import DataError, StorageError

PAUSES_S = (0.1, 1.0, 10.0, 60.0)
"""Between attempts."""


class LocalStore:
    """Reads parts of files below a folder. Holds nothing open: threads and forks may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on.

        Waits and tries again where the file system fails: a mount may come back.

        Raises:
            DataError: the file ends before.
            StorageError: the file is still missing or unreadable. Not the sample's fault, so a run
                stops instead of training on without it.
        """
        path = self.root / name
        for pause_s in (*PAUSES_S, None):
            try:
                with path.open("rb") as file:
                    file.seek(offset)
                    data = file.read(size)
                break
            except OSError as error:
                if pause_s is None:
                    raise StorageError(
                        f"{path} cannot be read: {error.strerror}  -> bring the folder back and "
                        "type the command again: training resumes from its newest checkpoint"
                    ) from error
                time.sleep(pause_s)
        if len(data) != size:
            raise DataError(
                f"{path} ends at byte {offset + len(data)}, before the {size} bytes from {offset} "
                "on: the shard was cut  -> copy it again"
            )
        return data

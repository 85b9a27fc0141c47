"""Files of one JSON object per line and step, that a resumed run continues: each step once."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class JsonLines:
    """A file that grows by a line at a time; made, with its folder, at the first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append, so that a killed process loses no finished step."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a")
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file, where there is one."""
        if self._file is not None:
            self._file.close()


def keep_until(path: Path, last_step: int) -> None:
    """Drop steps after ``last_step``, which will be trained again, and a half-written line.

    Nobody may have the file open.
    """
    with path.open() as file:
        whole = [line for line in file if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)

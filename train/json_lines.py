"""Files of one JSON object per line and step, that a resumed run continues: each step once.

They are for people: a line that cannot be read, as after a bit flipped, decides nothing and is
kept aside.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

TAIL_BYTES = 1 << 16
"""Of a file's end, with several lines."""
_log = logging.getLogger(__name__)


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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of whole steps, in order; lines that are none are passed over."""
    with path.open("rb") as file:
        yield from filter(None, map(_record, file))


def last_line(path: Path) -> dict[str, Any] | None:
    """The record of the last whole step; None where there is none, or it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            tail = file.read().splitlines()
    except OSError:
        return None
    return next(filter(None, map(_record, reversed(tail))), None)


def keep_until(path: Path, last_step: int) -> None:
    """Drop steps after ``last_step``, which will be trained again, and a half-written line.

    Lines that cannot be read are moved to ``NAME.unreadable``, with a warning. A file that cannot
    be read or replaced stays as it is, with a warning. Nobody may have the file open.
    """
    try:
        _cut(path, last_step)
    except OSError as error:
        _log.warning("%s stays as it is, with steps that will be trained again: %s", path, error)


def _cut(path: Path, last_step: int) -> None:
    kept, unreadable = [], []
    with path.open("rb") as file:
        whole = [line for line in file if line.endswith(b"\n")]
    for line in whole:
        record = _record(line)
        if record is None:
            unreadable.append(line)
        elif record["step"] <= last_step:
            kept.append(line)
    if unreadable:
        aside = path.with_suffix(".unreadable")
        with aside.open("ab") as file:
            file.writelines(unreadable)
        _log.warning("%s: %d of its lines cannot be read; see %s", path, len(unreadable), aside)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where it is none of ours."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None

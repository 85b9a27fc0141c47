"""What befell a run: ``events.jsonl`` in its folder, one JSON object per line, of all its starts.

Unlike metrics and ledgers it is history: a resumed run adds to it and takes nothing away, also
where steps are trained again. Only the main rank writes, since appends of many nodes to one file
are not atomic everywhere.
"""

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from triptych.train.json_lines import read_lines

EVENTS = "events.jsonl"
_log = logging.getLogger(__name__)


def record_event(run_dir: Path, what: str, *, step: int, **details: Any) -> None:
    """Append an event. A disk that takes none is a warning, never the end of a run.

    Args:
        run_dir: must exist.
        what: the kind of event, words joined by underscores, as ``update_skipped``.
        step: the last step that was finished.
        details: what else is known, as JSON takes it.
    """
    event = {"time": round(time.time(), 3), "what": what, "step": step, **details}
    line = (json.dumps(event) + "\n").encode()
    try:
        _append(run_dir / EVENTS, line)
    except OSError as error:
        _log.warning("%s does not take what happened (%s): %s", run_dir / EVENTS, what, error)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; what is no whole line is passed over."""
    path = run_dir / EVENTS
    return list(filter(_is_event, read_lines(path))) if path.exists() else []


def _append(path: Path, line: bytes) -> None:
    """In one piece, and on a line of its own also after one that a full disk has cut.

    Raises:
        OSError: it is not all written.
    """
    with path.open("ab+", buffering=0) as file:
        size = file.tell()
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = b"\n" + line
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_event(record: dict[str, Any]) -> bool:
    """Whether what all events have survived; a flipped bit may rename a key."""
    return isinstance(record.get("what"), str) and isinstance(record.get("time"), int | float)

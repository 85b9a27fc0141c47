"""What befell a run: ``events.jsonl`` in its folder, one JSON object per line, of all its starts.

Unlike metrics and ledgers it is history: a resumed run adds to it and takes nothing away, also
where steps are trained again. Only the main rank writes, since appends of many nodes to one file
are not atomic everywhere.
"""

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
        file = os.open(run_dir / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line)
        finally:
            os.close(file)
    except OSError as error:
        _log.warning("%s does not take what happened (%s): %s", run_dir / EVENTS, what, error)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; what is no whole line is passed over."""
    path = run_dir / EVENTS
    return list(filter(_is_event, read_lines(path))) if path.exists() else []


def _is_event(record: dict[str, Any]) -> bool:
    """Whether what all events have survived; a flipped bit may rename a key."""
    return isinstance(record.get("what"), str) and isinstance(record.get("time"), int | float)

"""Processes that a test has killed, or that should have ended with another."""

import time
from collections.abc import Iterable
from pathlib import Path


def is_alive(process_id: int) -> bool:
    """Whether the process runs. One that ended and was not yet reaped does not.

    A container may have nobody who reaps.
    """
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def wait_until_dead(process_ids: Iterable[int]) -> None:
    """Return once none of them is alive. Of one that lives on, pytest's time limit tells."""
    for process_id in process_ids:
        while is_alive(process_id):
            time.sleep(0.01)

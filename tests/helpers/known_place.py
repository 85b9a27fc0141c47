"""Something happens at a known place: when a process is about to change the file system there."""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

BEGUN = "step_000000004.0.tmp"
PLACES_IN_A_SAVE = {
    "before anything is written": ("os.mkdir", BEGUN),
    "while shards are written": ("open", f"{BEGUN}/shards/rank_00000.json"),
    "before COMMIT": ("open", f"{BEGUN}/COMMIT"),
    "after COMMIT": ("os.rename", BEGUN),
}
"""Of rank 0, in the save of step 4: audit events, and the end of the path that they name."""

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""Audit events of a change of the file system, beside opening a file to write."""


def is_change(event: str, args: tuple[Any, ...]) -> bool:
    """Whether the process is about to change the file system."""
    return event in CHANGES or (
        event == "open" and isinstance(args[2], int) and bool(args[2] & os.O_ACCMODE)
    )


def once_at(place: tuple[str, str], act: Callable[[], None]) -> None:
    """Call ``act`` before the first change that is this audit event, of a path that ends so."""
    armed = [True]

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if armed[0] and event == place[0] and str(args[0]).endswith(place[1]):
            armed[0] = False
            act()

    sys.addaudithook(hear)


def after_changes(count: int, act: Callable[[], None]) -> None:
    """Call ``act`` once, before the change that comes after ``count`` others."""
    left = [count]

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if is_change(event, args):
            left[0] -= 1
            if left[0] == -1:
                act()

    sys.addaudithook(hear)


def kill_all(process_ids: Iterable[int]) -> None:
    """SIGKILL; this process, if it is one of them, as the last."""
    for process_id in sorted(process_ids, key=os.getpid().__eq__):
        os.kill(process_id, signal.SIGKILL)

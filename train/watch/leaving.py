"""The end of a run that hangs: every rank writes its stacks, then all leave at about one time."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any, NoReturn

import psutil

from triptych.errors import TrainingError
from triptych.train.events import record_event
from triptych.train.failures import leave_failure
from triptych.train.last_words import speaks_first
from triptych.train.watch.place import here
from triptych.train.watch.stacks import write_stacks

STDERR = 2
LEAVE_S = 2.0
"""The ranks wait so long for each other's stacks: who leaves first ends the others."""


@dataclass(frozen=True, slots=True)
class Hang:
    """What one rank has found, for all to act on; JSON can hold it."""

    judge: int
    """The rank that found it."""
    step: int
    """The last that was finished."""
    late: list[dict[str, Any]]
    """The ranks that the others wait for, as they were seen."""
    silent: list[list[Any]]
    """Host and process of those of them that show no sign of life."""
    num_there: int
    """Ranks that have not left."""
    stacks: str
    """The folder to write into."""
    told: str


def leave(hang: Hang, store: Any, run_dir: Path, rank: int) -> NoReturn:
    """Write what there is to know, wait for the others to have done so, and end the process.

    With 1, and from any thread: the training thread may be where no exception reaches it.
    """
    _wake(hang.silent)
    with contextlib.suppress(OSError):
        heading = f"rank {rank}, host {gethostname()}, process {os.getpid()}: {here()}"
        write_stacks(Path(hang.stacks), rank, heading)
    if run_dir.is_dir():
        is_late = any(late["rank"] == rank for late in hang.late)
        leave_failure(run_dir, rank, TrainingError(hang.told), is_cause=is_late)
        if rank == hang.judge:
            record_event(run_dir, "hang", step=hang.step, late=hang.late, stacks=hang.stacks)
    deadline = time.monotonic() + LEAVE_S
    with contextlib.suppress(RuntimeError):  # the store is torchrun's, which may have ended
        store.add("written", 1)
        while store.add("written", 0) < hang.num_there and time.monotonic() < deadline:
            time.sleep(0.05)
    text = (
        f"TrainingError: the run hangs: {hang.told}\n  -> stacks of all ranks: {hang.stacks}; "
        'docs/operations.md, "It hangs"; type the command again: the run resumes'
    )
    if speaks_first(text):
        os.write(STDERR, f"{text}\n".encode())
    os._exit(1)


def _wake(silent: list[list[Any]]) -> None:
    """Let processes of this node that were stopped go on: they write their stacks and leave.

    Their training threads go on as well until then, for milliseconds.

    Only those of the same launcher: on this host a process of this number may be another.
    """
    for host, number in silent:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(number)
            is_ours = host == gethostname() and process.ppid() == os.getppid()
            if is_ours and process.status() == psutil.STATUS_STOPPED:
                os.kill(number, signal.SIGCONT)

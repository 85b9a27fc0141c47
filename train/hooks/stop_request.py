"""Ends a run by a signal or a file: all ranks stop after the same step, with a checkpoint.

    kill -TERM PID              save and stop; another, seconds later, ends the process at once
    kill -USR1 PID              save and stop, to be started again (Slurm: requeue)
    touch RUN_DIR/stop          as TERM, for whoever cannot reach the processes
    echo requeue > RUN_DIR/stop as USR1

A torchrun that has ended without its ranks, as after kill -9, asks them as USR1 does. One rank that
is asked is enough. ``stopped.json`` in ``run.dir`` then says how it ended.
"""

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from triptych.parallel.mesh import Mesh
from triptych.train.events import record_event
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState
from triptych.train.stop import StopReason

STOP, STOPPED = "stop", "stopped.json"
"""The files in ``run.dir``: what asks, and what tells of it."""
REQUEUE = "requeue"
SIGNALS = {signal.SIGTERM: False, signal.SIGUSR1: True}
"""Signal -> whether the run shall be started again."""
ONE_REQUEST_S = 5.0
"""TERMs within this time are one: Slurm sends it to all processes, and torchrun passes its on."""


class StopRequest(Hook):
    """On every rank, for signals; rank 0 also looks for the file, once a step.

    What was asked stays asked where a run goes back to an earlier checkpoint and on from there.
    """

    def __init__(self, run_dir: Path, mesh: Mesh) -> None:
        self._file = run_dir / STOP if mesh.is_main else None
        self._reason: StopReason | None = None
        self._before: dict[int, Any] = {}
        self._first_term: float | None = None
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def on_start(self, state: TrainState) -> None:
        """Listen from here on; before there was nothing to save."""
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}

    def after_step(self, event: StepEvent) -> StopReason | None:
        """Ask, where this rank was asked."""
        if self._file is not None:
            # There is none, most often; one that cannot be read is looked for after a step more.
            with contextlib.suppress(OSError):
                requeue = self._file.read_text().strip() == REQUEUE
                self._ask(f"the file {self._file}", requeue=requeue)
        if self._agent not in (None, os.getppid()) and self._reason is None:
            self._ask("its torchrun has ended without it", requeue=True)
        return self._reason

    def close(self) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        asked, now = signal.Signals(number), time.monotonic()
        if asked is signal.SIGTERM:
            self._first_term = self._first_term or now
            if now - self._first_term >= ONE_REQUEST_S:
                signal.signal(asked, signal.SIG_DFL)
                os.kill(os.getpid(), asked)
        self._ask(asked.name, requeue=SIGNALS[asked])

    def _ask(self, by: str, *, requeue: bool) -> None:
        """The latest counts, but who does not want it to start again is not overruled."""
        if self._reason is None or self._reason.requeue or not requeue:
            self._reason = StopReason(by, requeue=requeue)


def forget_stop(run_dir: Path) -> None:
    """Remove both files, also of a start before that died: nothing has asked this one yet."""
    for name in (STOP, STOPPED):
        (run_dir / name).unlink(missing_ok=True)


def tell_of_stop(run_dir: Path, step: int, reasons: list[tuple[int, StopReason]]) -> None:
    """Write down for scripts that the run stopped as asked, and whether it shall start again.

    Not if any reason says no: who cancels a job that is about to be requeued means it.
    """
    told: dict[str, Any] = {
        "step": step,
        "requeue": all(reason.requeue for _, reason in reasons),
        "asked_by": {f"rank {rank}": reason.text for rank, reason in reasons},
    }
    (run_dir / STOP).unlink(missing_ok=True)
    (run_dir / STOPPED).write_text(json.dumps(told, indent=1) + "\n")
    record_event(run_dir, "stopped", **told)

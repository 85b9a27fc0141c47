"""Tells ``events.jsonl`` of the first step and of an error that ends training."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from triptych.parallel.mesh import Mesh
from triptych.train.events import record_event
from triptych.train.failures import describe, leave_failure
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState


class History(Hook):
    """On every rank: each leaves why it failed, the main rank writes the history."""

    def __init__(self, run_dir: Path, mesh: Mesh) -> None:
        self._run_dir, self._mesh = run_dir, mesh
        self._step = 0
        self._began: float | None = None
        self._is_first = True
        self._has_failed = False

    @contextlib.contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Also those of a time when no hook runs: as hooks are made, or the run goes back."""
        try:
            yield
        except BaseException as error:
            if not self._has_failed:
                self.on_error(error)
            raise

    def on_start(self, state: TrainState) -> None:
        """The first step counts from here; not again where the run goes back."""
        self._step = state.step
        self._began = time.monotonic() if self._is_first else None
        self._is_first = False

    def after_step(self, event: StepEvent) -> None:
        """Record the first: start-up ends with it."""
        self._step = event.state.step
        if self._began is not None and self._mesh.is_main:
            seconds = round(time.monotonic() - self._began, 2)
            record_event(self._run_dir, "first_step", step=self._step, seconds=seconds)
        self._began = None

    def on_error(self, error: BaseException) -> None:
        """Leave it for the next start, and for whoever reads the history before."""
        self._has_failed = True
        interrupted = isinstance(error, KeyboardInterrupt)
        if not interrupted:
            leave_failure(self._run_dir, self._mesh.rank, error)
        if self._mesh.is_main:
            what = "interrupted" if interrupted else "failed"
            record_event(self._run_dir, what, step=self._step, error=describe(error))

"""A trace of some steps, and a picture of the device's memory, where ``train.profile`` asks."""

from pathlib import Path

from torch import profiler

from triptych.configs.rules.training import profiled_steps
from triptych.configs.schema import Config
from triptych.parallel.device import dump_memory_history, record_memory_history
from triptych.parallel.mesh import Mesh
from triptych.train.console import say
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState

PROFILE = "profile"
"""The folder in ``run.dir``."""


class Profiler(Hook):
    """Writes ``profile/pp_00000.trace.json.gz``, which chrome://tracing and Perfetto show.

    On CUDA also ``pp_00000.memory.pickle``, for https://pytorch.org/memory_viz. Runs on one rank of
    each pipeline stage. Profiled steps are slower; what hooks before this one do is in the trace.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        steps = profiled_steps(config.train.profile)
        assert steps is not None, "the hook is there where they are"
        self._first, self._last = steps
        self._device = mesh.device
        self._prefix = Path(config.run.dir) / PROFILE / f"pp_{mesh.pp_rank:05d}"
        self._running: profiler.profile | None = None

    def before_step(self, state: TrainState) -> None:
        """Start before the first of the steps, or before the first that is left of them."""
        if self._running is None and self._first <= state.step + 1 <= self._last:
            activities = [profiler.ProfilerActivity.CPU]
            activities += [profiler.ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            record_memory_history()
            self._running = profiler.profile(activities=activities, profile_memory=True)
            self._running.start()

    def after_step(self, event: StepEvent) -> None:
        """Write, after the last of them."""
        if self._running is not None and (event.state.step == self._last or event.is_last):
            self._running.stop()
            self._prefix.parent.mkdir(parents=True, exist_ok=True)
            self._running.export_chrome_trace(f"{self._prefix}.trace.json.gz")
            dump_memory_history(f"{self._prefix}.memory.pickle")
            self._running = None
            say(f"profile: {self._prefix}.trace.json.gz")

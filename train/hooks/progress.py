"""Lines on the terminal: where a run stands, loss, rates, time left, memory."""

import time
from collections import deque
from collections.abc import Mapping
from itertools import accumulate
from statistics import mean, median

from triptych.configs.schema import Config
from triptych.parallel.mesh import Mesh
from triptych.train.console import COLUMNS, duration, say
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.start_up import StartUp
from triptych.train.state import TrainState

RECENT_STEPS = 20
"""Rates and time left follow the median of these: a slow step among them changes neither."""
SILENT_S = 60.0
"""However long steps are, a line comes this often: watchdogs take silence for a hung job."""
NOTABLE = 0.01
"""Of the time, spent waiting for data."""
SEPARATOR = " | "


class Progress(Hook):
    """Prints on rank 0, from the training thread: silence means that training stands still."""

    def __init__(self, config: Config, mesh: Mesh, start_up: StartUp) -> None:
        self._config, self._mesh, self._start_up = config, mesh, start_up
        self._steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._tokens: deque[int] = deque(maxlen=RECENT_STEPS)
        self._flops: deque[float] = deque(maxlen=RECENT_STEPS)
        self._waits_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._is_first = True

    def on_start(self, state: TrainState) -> None:
        """The first step counts from here; what was before is start-up."""
        self._step_ended = self._told = time.perf_counter()

    def measure(self, event: StepEvent) -> Mapping[str, float]:
        """``left_s``, from the second step on: seconds until the stage ends, at the recent rate."""
        now = time.perf_counter()
        self._step_s, self._step_ended = now - self._step_ended, now
        if self._is_first:  # it loads, compiles and allocates: rates follow the steps after it
            return {}
        self._steps_s.append(self._step_s)
        self._tokens.append(event.result.totals.workload.num_tokens)
        self._flops.append(event.metrics["flops"])
        self._waits_s.append(event.metrics["data_s"])
        return {"left_s": self._steps_left(event) * median(self._steps_s)}

    def after_step(self, event: StepEvent) -> None:
        """Print every ``log.every`` steps, at the first and the last, and where it was silent."""
        now = time.perf_counter()
        is_first, self._is_first = self._is_first, False
        if is_first:
            say(f"start-up took {self._start_up}, the first step {self._step_s:.1f} s")
        is_due = event.state.step % self._config.log.every == 0 or now - self._told >= SILENT_S
        if is_due or is_first or event.is_last:
            self._told = now
            say(self._line(event))

    def _line(self, event: StepEvent) -> str:
        """What fits, of the greatest interest first; ``metrics.jsonl`` has all of it."""
        cap = self._config.train.num_steps
        of = "" if cap is None else f"/{cap}"
        loss = "none" if event.result.loss is None else f"{event.result.loss:.4f}"
        validation = event.metrics.get("validation_loss")
        validated = "" if validation is None else f", validation {validation:.4f}"
        parts = [
            f"{self._config.stage.name} step {event.state.step}{of}",
            f"loss {loss}{validated}, {_norm(event)}",
            _memory(event),
            *self._rates(event),
            *self._mfu(),
            f"lr {max(event.result.lr.values()):.1e}".replace("e-0", "e-"),
            f"fill {event.metrics['fill']:.3f}",
        ]
        ends = accumulate(len(SEPARATOR) + len(part) for part in parts)
        columns = COLUMNS + len(SEPARATOR)  # there is none before the first
        return SEPARATOR.join(part for part, end in zip(parts, ends, strict=True) if end <= columns)

    def _rates(self, event: StepEvent) -> list[str]:
        """Tokens and seconds of the median step, the time left, the share that waits for data."""
        if not self._steps_s:
            return []
        step_s = median(self._steps_s)
        rate = median(n / s for n, s in zip(self._tokens, self._steps_s, strict=True))
        waits = sum(self._waits_s) / sum(self._steps_s)
        return [
            f"{_compact(rate)} tok/s, {step_s:.3g} s/step",
            f"left {duration(event.metrics['left_s'])}",
            *([f"data {waits:.0%}"] if waits >= NOTABLE else []),
        ]

    def _mfu(self) -> list[str]:
        """By the model's FLOPs, where the peak is known."""
        peak = self._config.cluster.peak_tflops
        if not peak or not self._steps_s:
            return []
        rate = median(n / s for n, s in zip(self._flops, self._steps_s, strict=True))
        return [f"MFU {rate / (self._mesh.dims.world_size * peak * 1e12):.0%}"]

    def _steps_left(self, event: StepEvent) -> float:
        """Until the budget or the cap ends the stage."""
        left = (self._config.stage.token_budget - event.state.consumed_tokens) / mean(self._tokens)
        cap = self._config.train.num_steps
        return max(0.0, left if cap is None else min(left, cap - event.state.step))


def _norm(event: StepEvent) -> str:
    """Of the gradient; or that none was applied."""
    veto, norm = event.result.veto, event.result.grad_norm
    return f"{veto.cause.value}: skipped" if veto else f"norm {norm:.3g}"


def _memory(event: StepEvent) -> str:
    """Of the device, where it has its own."""
    device, host = event.metrics["device_memory_bytes"], event.metrics["host_memory_bytes"]
    return f"{(host if device is None else device) / 2**30:.1f} GiB"


def _compact(number: float) -> str:
    """As "1.23M", "45.6k" or "789"."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"

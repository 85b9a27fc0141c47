"""A line on the terminal for each step: where it stands, loss, rate, time left."""

import time
from collections import deque

from triptych.configs.schema import Config
from triptych.parallel.mesh import Mesh
from triptych.train.console import say
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState

RECENT_STEPS = 20
"""Rate and time left follow these."""


class Progress(Hook):
    """Prints on rank 0, from the training thread: silence means that training stands still."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._ends: deque[float] = deque(maxlen=RECENT_STEPS + 1)
        self._waits: deque[float] = deque(maxlen=RECENT_STEPS)
        self._tokens: deque[int] = deque(maxlen=RECENT_STEPS)
        self._flops: deque[float] = deque(maxlen=RECENT_STEPS)

    def on_start(self, state: TrainState) -> None:
        """The first step counts from here."""
        self._ends.append(time.perf_counter())

    def after_step(self, event: StepEvent) -> None:
        """Print every ``log.every`` steps, and at the last."""
        self._ends.append(time.perf_counter())
        self._waits.append(event.metrics["data_s"])
        self._tokens.append(event.result.totals.workload.num_tokens)
        self._flops.append(event.metrics["flops"])
        if event.state.step % self._config.log.every == 0 or event.is_last:
            say(self._line(event))

    def _line(self, event: StepEvent) -> str:
        elapsed = self._ends[-1] - self._ends[0]
        step_s, rate = elapsed / len(self._tokens), sum(self._tokens) / elapsed
        data_s = sum(self._waits) / len(self._waits)
        loss = "none" if event.result.loss is None else f"{event.result.loss:.4f}"
        rates = [f"{part} {value:.1e}" for part, value in event.result.lr.items() if value]
        validation = event.metrics.get("validation_loss")
        steps_left, of = self._remaining(event, step_s * rate)
        return (
            f"{self._config.stage.name} step {event.state.step}{of} | loss {loss}"
            + (f" | validation {validation:.4f}" if validation is not None else "")
            + f" | norm {event.result.grad_norm:.3f} | lr {' '.join(rates) or 0}"
            + f" | {rate:,.0f} tokens/s | {self._speed(elapsed)}"
            + f" | {step_s:.2f} s/step, {data_s:.2f} for data"
            + f" | fill {event.metrics['fill']:.3f} | left {duration(steps_left * step_s)}"
        )

    def _speed(self, elapsed_s: float) -> str:
        """Speed of one rank by the model's FLOPs, and its share of the peak where that is known."""
        tflops = sum(self._flops) / elapsed_s / self._mesh.dims.world_size / 1e12
        peak = self._config.cluster.peak_tflops
        return f"{tflops:.3g} TFLOP/s per rank" + (f", MFU {tflops / peak:.1%}" if peak else "")

    def _remaining(self, event: StepEvent, tokens_per_step: float) -> tuple[float, str]:
        """Steps until the budget or the cap ends the stage, and the cap as text."""
        left = (self._config.stage.token_budget - event.state.consumed_tokens) / tokens_per_step
        cap = self._config.train.num_steps
        if cap is None:
            return max(0.0, left), ""
        return max(0.0, min(left, cap - event.state.step)), f"/{cap}"


def duration(seconds: float) -> str:
    """As "3d 04h", "2h 05m" or "1m 07s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    days, hours_rest = divmod(hours, 24)
    if days:
        return f"{days}d {hours_rest:02d}h"
    return f"{hours}h {minutes_rest:02d}m" if hours else f"{minutes}m {rest:02d}s"

"""A picture of the loss so far, in the run folder."""

import os
from itertools import accumulate
from pathlib import Path

from triptych.configs.schema import Config
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.json_lines import read_lines
from triptych.train.records import METRICS

PICTURE = "loss_curve.png"
"""The file in ``run.dir``."""
LEAST_STEPS = 10
"""Fewer make no curve; Matplotlib, which is slow to load, is not asked for them."""
SHARE = 50
"""The smoothed curve averages so small a part of the steps."""


class LossCurve(Hook):
    """Draws ``loss_curve.png`` with every checkpoint; on rank 0, after ``metrics.jsonl``."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._every, self._run_dir = config.run.checkpoint_every, run_dir

    def after_step(self, event: StepEvent) -> None:
        """Draw all steps of the run, also those before it was resumed, where it is time to."""
        step = event.state.step
        if step >= LEAST_STEPS and (step % self._every == 0 or event.is_last):
            draw(self._run_dir)


def draw(run_dir: Path) -> None:
    """Draw the losses in ``metrics.jsonl``; the picture before stays until this one is whole."""
    from matplotlib.figure import Figure  # late: slow to load

    lines = list(read_lines(run_dir / METRICS))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per supervised token", yscale="log")
    steps, losses = _curve(lines, "loss")
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.7)
    window = max(LEAST_STEPS, len(losses) // SHARE)
    label = f"training, mean of {window} steps"
    axes.plot(steps, _means(losses, window), color="#1f4e8c", linewidth=1.8, label=label)
    steps, losses = _curve(lines, "validation_loss")
    if steps:
        axes.plot(steps, losses, "o-", color="#b3261e", markersize=3, label="validation")
    axes.set_title(str(run_dir))
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    temporary = run_dir / f".{PICTURE}.tmp"
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, run_dir / PICTURE)


def _curve(lines: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values, of the lines that have one."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _means(values: list[float], window: int) -> list[float]:
    """Of each value and those before it, ``window`` at most."""
    sums = [0.0, *accumulate(values)]
    ends = range(1, len(sums))
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in ends]

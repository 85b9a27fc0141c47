"""A picture of one step: what each pipeline stage does when."""

from pathlib import Path
from typing import Any

from triptych.configs.problems import either
from triptych.costs.estimate import Estimate
from triptych.costs.pipeline_schedule import Event
from triptych.errors import ConfigError

FORWARD = ("#1f4e8c", "#5b8ac4", "#9db7d5", "#cfdcec")
BACKWARD = ("#a3541d", "#cf8147", "#e3ab80", "#f2d5bd")
"""Colours by model chunk, the first one darkest."""
DP, LINE = "#6b7280", "#ffffff"
MOST_NUMBERED = 400
"""Passes; above, their microbatches would not be readable."""
FORMATS = (".png", ".pdf", ".svg")


def draw_timeline(estimate: Estimate, path: Path) -> Path:
    """Draw the step: forward passes blue, backward passes brown, idle time white.

    Returns:
        The picture.

    Raises:
        ConfigError: no such folder, or a kind of file that is not drawn.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"--picture {path} must end in {either(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: {path.parent} is no folder  -> mkdir -p it")
    from matplotlib.figure import Figure  # needs no display

    pp = estimate.config.parallel.pp
    figure = Figure(figsize=(13, 1.6 + 0.42 * pp))
    axes = figure.add_subplot()
    for stage in range(pp):
        passes = [event for event in estimate.timeline.events if event.stage == stage]
        _draw_stage(axes, stage, passes, numbered=len(estimate.timeline.events) <= MOST_NUMBERED)
    if estimate.dp.exposed_s:
        span = (estimate.timeline.makespan_s, estimate.dp.exposed_s)
        axes.broken_barh([span], (-0.45, pp - 0.1), color=DP)
    _label(axes, estimate)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return path


def _draw_stage(axes: Any, stage: int, passes: list[Event], *, numbered: bool) -> None:
    spans = [(event.start_s, event.end_s - event.start_s) for event in passes]
    colors = [
        (BACKWARD if event.is_backward else FORWARD)[event.chunk % len(FORWARD)] for event in passes
    ]
    width = 0.6 if numbered else 0.2
    axes.broken_barh(spans, (stage - 0.45, 0.9), color=colors, edgecolor=LINE, linewidth=width)
    for event in passes if numbered else ():
        middle = (event.start_s + event.end_s) / 2
        axes.text(middle, stage, event.microbatch, ha="center", va="center", size=6, color=LINE)


def _label(axes: Any, estimate: Estimate) -> None:
    parallel, pp = estimate.config.parallel, estimate.config.parallel.pp
    names = [
        f"stage {stage}: " + "+".join(str(count) for count in estimate.layers[stage::pp])
        for stage in range(pp)
    ]
    names[0] += " and ViT"
    names[-1] += " and head"
    axes.set_yticks(range(pp), names)
    axes.set_ylim(pp - 0.4, -0.6)
    axes.set_xlim(0, estimate.step_s)
    axes.set_xlabel(
        "seconds; blue forward, brown backward, darker the earlier chunk; grey: gradients and "
        "weights between replicas"
    )
    axes.set_title(
        f"{estimate.config.model.name}, {estimate.config.stage.name}: tp {parallel.tp}, pp {pp}, "
        f"dp {estimate.shape.dp}, {estimate.shape.num_microbatches} microbatches, "
        f"bubble {estimate.timeline.bubble:.1%}, MFU {estimate.mfu:.1%}"
    )
    axes.spines[["top", "right"]].set_visible(False)

"""Which charts a page has: what of ``metrics.jsonl`` is drawn where, and what is missing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from triptych.launch.reporting.chart import Chart, Series, line_chart, stacked_chart
from triptych.launch.reporting.run_record import RunRecord
from triptych.launch.reporting.step_table import Numbers
from triptych.launch.reporting.time_spent import PARTS, parts_of_steps
from triptych.launch.reporting.timeline import marks_of

OF_EACH_STEP = ("step", "time", "left_s", "flops", "num_kept", "num_decoded", "decode_s")
"""Numbers that say little as curves, or are part of others."""
SAME_TOKENS = 1.01
"""Runs of one stage are drawn over steps if their tokens per step differ by less, else over
tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Some metrics in one chart; a name that ends in / takes the whole group."""

    title: str
    metrics: tuple[str, ...]
    factor: float = 1.0
    is_log: bool = False
    from_zero: bool = False
    smooth: bool = False
    hides_zeros: bool = False
    """Draws nothing where all is 0, and good."""


@dataclass(frozen=True, slots=True)
class PageSection:
    """A part of the page."""

    title: str
    charts: list[Chart]
    missing: list[str]
    """What it would show and a run has not, each as a sentence."""


SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Loss": (
        Figure(
            title="Loss per supervised token",
            metrics=("loss", "validation_loss"),
            is_log=True,
            smooth=True,
        ),
        Figure(title="Validation loss", metrics=("validation_loss_by_source/",), is_log=True),
        Figure(title="Share of right answers", metrics=("accuracy/",), from_zero=True),
    ),
    "Optimiser": (
        Figure(
            title="Gradient norm, before clipping", metrics=("grad_norm",), is_log=True, smooth=True
        ),
        Figure(title="Learning rate", metrics=("lr/",), from_zero=True),
    ),
    "Speed": (
        Figure(title="Tokens per second", metrics=("tokens_per_s",), from_zero=True, smooth=True),
        Figure(title="MFU, %", metrics=("mfu",), factor=100.0, from_zero=True, smooth=True),
        Figure(
            title="Memory, GiB",
            metrics=("host_memory_bytes", "device_memory_bytes"),
            factor=2.0**-30,
            from_zero=True,
        ),
    ),
    "Data": (
        Figure(title="Fill: share of the packs' positions with a token", metrics=("fill",)),
        Figure(title="Imbalance: planned cost, dearest rank over mean", metrics=("imbalance",)),
        Figure(title="Tokens of each source", metrics=("tokens_by_source/",), smooth=True),
        Figure(title="Image patches per step", metrics=("num_patches",), from_zero=True),
        Figure(
            title="Tokens per step", metrics=("num_tokens", "num_supervised_tokens"), from_zero=True
        ),
        Figure(title="Read per step, MiB", metrics=("read_bytes",), factor=2.0**-20),
        Figure(
            title="Unreadable samples per step",
            metrics=("num_unreadable",),
            from_zero=True,
            hides_zeros=True,
        ),
    ),
}
SPOKEN = {
    "loss": "training",
    "num_tokens": "all",
    "num_supervised_tokens": "supervised",
    "host_memory_bytes": "host",
    "device_memory_bytes": "device",
    "read_bytes": "read",
}
"""What the curve of a metric is called, where its own name says less beside the title."""
MISSING = {
    "validation_loss": "No validation loss: train.validate_every=N measures it every N steps.",
    "mfu": "No MFU: cluster.peak_tflops says what a device can do.",
    "device_memory_bytes": "No memory of a device: the run was on CPUs.",
}
"""What is said where no run has a metric."""


def sections(runs: Sequence[RunRecord]) -> list[PageSection]:
    """All charts of the runs, those of one stage side by side in each."""
    stages = _by_stage([run for run in runs if len(run.steps)])
    found = []
    for title, figures in SECTIONS.items():
        charts = [c for figure in figures for stage in stages for c in _charts(figure, stage)]
        if title == "Speed":
            charts += [_time_chart(run, several=len(runs) > 1) for run in runs if len(run.steps)]
        wanted = {name for figure in figures for name in figure.metrics}
        present = {name for stage in stages for run in stage for name in run.steps.names}
        missing = [told for name, told in MISSING.items() if name in wanted - present]
        found.append(PageSection(title, charts, missing if stages else []))
    others = [c for figure in _others(runs) for stage in stages for c in _charts(figure, stage)]
    return [*found, *([PageSection("More numbers", others, [])] if others else [])]


def _by_stage(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs of a stage together, the stages in the order of their first runs."""
    order = list(dict.fromkeys(run.steps.stage for run in runs))
    by_order = sorted(runs, key=lambda run: order.index(run.steps.stage))
    return [list(stage) for _, stage in groupby(by_order, key=lambda run: run.steps.stage)]


def _others(runs: Sequence[RunRecord]) -> list[Figure]:
    """A figure for each metric, or group of them, that no section names."""
    known = {name for figures in SECTIONS.values() for figure in figures for name in figure.metrics}
    known |= {*OF_EACH_STEP, *PARTS, "step_time_s", "flops_per_s"}
    names = dict.fromkeys(_family(name) for run in runs for name in run.steps.names)
    return [
        Figure(title=name.rstrip("/").replace("_", " "), metrics=(name,))
        for name in names
        if name not in known and not name.startswith("consumed_")
    ]


def _family(name: str) -> str:
    """``group/`` of ``group/name``; a name without a group as it is."""
    group, slash, _ = name.partition("/")
    return group + slash


def _charts(figure: Figure, runs: Sequence[RunRecord]) -> Iterator[Chart]:
    """The figure for one stage; nothing where no run has its metrics."""
    x_name, x_label = _abscissa(runs)
    found = [(run, same) for run in runs for same in _alike(run, figure)]
    if not found:
        return
    names = list(dict.fromkeys(names[0] for _, names in found))
    series = [
        Series(
            label=_label(run, same, len(runs) > 1, len(names) > 1),
            x=run.steps[x_name],
            y=figure.factor * run.steps[same[0]],
            colour=runs.index(run) if len(runs) > 1 else names.index(same[0]),
            is_dashed=len(runs) > 1 and names.index(same[0]) > 0,
            shows_points=_is_seldom(run.steps[same[0]]),
        )
        for run, same in found
    ]
    yield line_chart(
        _titled(figure.title, runs),
        series,
        x_label=x_label,
        is_log=figure.is_log,
        from_zero=figure.from_zero,
        smooth=figure.smooth,
        events=marks_of(runs[0]) if len(runs) == 1 else (),
    )


def _alike(run: RunRecord, figure: Figure) -> list[list[str]]:
    """The metrics of a figure that a run has; those that are the same in every step together."""
    alike: dict[bytes, list[str]] = {}
    for name in run.steps.names:
        if figure.hides_zeros and not np.nansum(run.steps[name]):
            continue
        if name in figure.metrics or _family(name) in figure.metrics:
            alike.setdefault(run.steps[name].tobytes(), []).append(name)
    return list(alike.values())


def _is_seldom(values: Numbers) -> bool:
    """Whether a metric is measured in some steps only, as a validation loss."""
    return 2 * int(np.isfinite(values).sum()) < len(values)


def _abscissa(runs: Sequence[RunRecord]) -> tuple[str, str]:
    """The metric that lies below the charts of a stage, and its name there."""
    sizes = [(run.steps.last("consumed_tokens") or 0) / len(run.steps) for run in runs]
    if min(sizes) > 0 and max(sizes) > SAME_TOKENS * min(sizes):
        return "consumed_tokens", "tokens"
    return "step", "step"


def _label(run: RunRecord, names: Sequence[str], several_runs: bool, several_names: bool) -> str:
    if several_runs and not several_names:
        return run.name
    label = ", ".join(map(_short, names))
    return f"{run.name}: {label}" if several_runs else label


def _short(name: str) -> str:
    """``name`` of ``group/name``; a metric's own name in words."""
    inner = name.partition("/")[2]
    return inner or SPOKEN.get(name, name.replace("_", " "))


def _titled(title: str, runs: Sequence[RunRecord]) -> str:
    stage = runs[0].steps.stage
    return f"{title}, {stage}" if stage else title


def _time_chart(run: RunRecord, *, several: bool) -> Chart:
    parts = parts_of_steps(run)
    return stacked_chart(
        f"Where a step's time goes, s, {run.name if several else run.steps.stage}",
        [
            Series(label, run.steps["step"], seconds, colour)
            for colour, (label, seconds) in enumerate(parts.items())
        ],
        x_label="step",
        note="In brackets: the mean of all steps. Hooks: validation, saves, logs.",
    )

"""A chart as numbers that the page's template draws: curves thinned to what a screen can show.

A curve lies in a square of ``SIDE`` x ``SIDE`` units, which the page stretches to any width; text
stands beside it, at a size of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from triptych.launch.reporting.axis import Axis, Tick, compact
from triptych.launch.reporting.step_table import Numbers

SIDE = 1000
NUM_COLUMNS = 250
"""A curve of more points is drawn as the least and the largest of each column."""
SHARE = 50
"""The smooth curve averages so small a part of the points."""
LEAST_POINTS = 100
"""Fewer are not smoothed: the mean would lag behind what one sees."""
LEAST_WINDOW = 10


@dataclass(frozen=True, slots=True)
class Series:
    """Numbers over steps or tokens, of one run."""

    label: str
    x: Numbers
    y: Numbers
    """NaN where there is none."""
    colour: int
    """Of the page's palette."""
    is_dashed: bool = False
    shows_points: bool = False
    """For few that are far apart, as validation losses."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A series as it is drawn."""

    label: str
    colour: int
    is_dashed: bool
    raw: str
    """Path of all points; empty where ``line`` has all of them."""
    line: str
    """Path of the running mean, or of all points."""
    area: str = ""
    """Path of a filled area, in place of lines."""
    points: Sequence[tuple[float, float]] = ()
    """Percent from the left and the top."""
    latest: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a step."""

    place: float
    """Percent from the left."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart."""

    title: str
    x_label: str
    curves: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Mark] = field(default=())
    note: str = ""


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    is_log: bool = False,
    from_zero: bool = False,
    smooth: bool = False,
    events: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Chart:
    """Curves over a common axis.

    Args:
        title: what is shown, with its unit.
        series: with at least one finite number each.
        x_label: of the axis below.
        is_log: whether the upright axis is logarithmic; numbers that are not positive are left out.
        from_zero: whether it begins at 0.
        smooth: whether running means are drawn over the points.
        events: (x, text) of upright lines.
        note: to be written below.
    """
    known = [_known(each, positive=is_log) for each in series]
    x_axis = Axis.along(np.concatenate([x for x, _ in known]))
    y_axis = Axis.over(np.concatenate([y for _, y in known]), is_log=is_log, from_zero=from_zero)
    curves = [
        _curve(each, x_axis.places(x), y, y_axis, smooth=smooth)
        for each, (x, y) in zip(series, known, strict=True)
    ]
    return Chart(
        title=title,
        x_label=x_label,
        curves=curves,
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        marks=_marks(events, x_axis),
        note=note,
    )


def stacked_chart(title: str, parts: Sequence[Series], *, x_label: str, note: str = "") -> Chart:
    """Parts of a whole on top of each other, averaged over each column; NaN counts as 0.

    All parts have the same ``x``.
    """
    x_axis = Axis.along(parts[0].x)
    columns = _columns(x_axis.places(parts[0].x))
    at = _means(x_axis.places(parts[0].x), columns)
    means = [_means(np.nan_to_num(part.y), columns) for part in parts]
    tops = np.cumsum(means, axis=0)
    y_axis = Axis.over(tops[-1], from_zero=True)
    floors = [np.zeros(len(at)), *tops[:-1]]
    curves = [
        Curve(
            part.label,
            part.colour,
            is_dashed=False,
            raw="",
            line="",
            area=_path(
                np.concatenate([at, at[::-1]]),
                y_axis.places(np.concatenate([top, floor[::-1]])),
            ),
            latest=compact(float(np.mean(mean))),
        )
        for part, top, floor, mean in zip(parts, tops, floors, means, strict=True)
    ]
    return Chart(
        title=title,
        x_label=x_label,
        curves=curves,
        x_ticks=x_axis.ticks(),
        y_ticks=y_axis.ticks(),
        note=note,
    )


def _known(series: Series, *, positive: bool) -> tuple[Numbers, Numbers]:
    """The points that have numbers on both axes."""
    shown = np.isfinite(series.x) & np.isfinite(series.y)
    if positive:
        shown &= series.y > 0
    return series.x[shown], series.y[shown]


def _curve(series: Series, x: Numbers, y: Numbers, axis: Axis, *, smooth: bool) -> Curve:
    """Args: ``x`` as shares of its axis."""
    raw = _extremes(x, axis.places(y))
    line, is_smoothed = raw, smooth and len(y) >= LEAST_POINTS
    if is_smoothed:
        columns = _columns(x)
        means = running_means(y, max(LEAST_WINDOW, len(y) // SHARE))
        line = _path(_means(x, columns), axis.places(_means(means, columns)))
    points = zip(100 * x, 100 * (1 - axis.places(y)), strict=True)
    return Curve(
        series.label,
        series.colour,
        series.is_dashed,
        raw=raw if is_smoothed else "",
        line=line,
        points=[(round(a, 2), round(b, 2)) for a, b in points]
        if len(y) == 1 or (series.shows_points and len(y) <= NUM_COLUMNS)
        else (),
        latest=compact(float(y[-1])) if len(y) else "none",
    )


def running_means(values: Numbers, window: int) -> Numbers:
    """Of each value and those before it, ``window`` at most."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    means: Numbers = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _columns(x: Numbers) -> NDArray[np.intp]:
    """Where each column of points begins: every point is one where they are few."""
    if len(x) <= NUM_COLUMNS:
        return np.arange(len(x))
    column = np.minimum(x * NUM_COLUMNS, NUM_COLUMNS - 1).astype(int)
    return np.flatnonzero(np.concatenate([[True], column[1:] != column[:-1]]))


def _means(values: Numbers, columns: NDArray[np.intp]) -> Numbers:
    """Of each column."""
    counts = np.diff(np.concatenate([columns, [len(values)]]))
    means: Numbers = np.add.reduceat(values, columns) / counts if len(values) else values
    return means


def _extremes(x: Numbers, y: Numbers) -> str:
    """A path through the least and the largest point of each column."""
    if len(x) <= 2 * NUM_COLUMNS:
        return _path(x, y)
    columns = _columns(x)
    ends = np.stack([np.minimum.reduceat(y, columns), np.maximum.reduceat(y, columns)], axis=1)
    return _path(np.repeat(_means(x, columns), 2), ends.ravel())


def _path(x: Numbers, y: Numbers) -> str:
    """An SVG path through points that are shares of the axes, upwards."""
    at_x = np.rint(SIDE * x).astype(int)
    at_y = np.rint(SIDE * (1 - y)).astype(int)
    if not len(x):
        return ""
    moves = zip(np.diff(at_x).tolist(), np.diff(at_y).tolist(), strict=True)
    joined = "".join(f" {dx}{dy if dy < 0 else f' {dy}'}" for dx, dy in moves)
    return f"M{at_x[0]} {at_y[0]}" + (f"l{joined[1:]}" if joined else "")


def _marks(events: Sequence[tuple[float, str]], axis: Axis) -> list[Mark]:
    places = 100 * axis.places(np.array([x for x, _ in events], dtype=np.float64))
    return [
        Mark(round(float(place), 2), text)
        for place, (_, text) in zip(places, events, strict=True)
        if 0 <= place <= 100
    ]

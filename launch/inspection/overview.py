"""How long the samples of a dataset are, and how large its images and videos: ``report.png``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triptych.data.dataset.dataset import Dataset
from triptych.data.types import MediaKind

CHUNK = 1 << 20
"""Samples that are counted at a time, so that memory does not grow with the dataset."""
LENGTHS = 2.0 ** np.arange(0, 24.1, 0.5)
"""Bounds of bins: text tokens, placeholders counted once."""
SIDES = 2.0 ** np.arange(0, 18.1, 0.25)
"""Pixels of a width or height."""
DURATIONS_S = 2.0 ** np.arange(-6, 17.1, 0.5)
BLUE = "#1f4e8c"


def _zeros(*shape: int) -> NDArray[np.int64]:
    return np.zeros(shape, dtype=np.int64)


@dataclass(slots=True)
class Overview:
    """Counts of samples and media by bin."""

    lengths: NDArray[np.int64] = field(default_factory=lambda: _zeros(len(LENGTHS) - 1))
    longest: int = 0
    sizes: dict[MediaKind, NDArray[np.int64]] = field(
        default_factory=lambda: {k: _zeros(len(SIDES) - 1, len(SIDES) - 1) for k in MediaKind}
    )
    """By width and height."""
    durations: NDArray[np.int64] = field(default_factory=lambda: _zeros(len(DURATIONS_S) - 1))
    """Of videos."""

    @classmethod
    def of(cls, dataset: Dataset) -> "Overview":
        """Count a dataset, from its indexes alone."""
        overview = cls()
        for start in range(0, len(dataset), CHUNK):
            lengths, rows = dataset.extents(start, min(start + CHUNK, len(dataset)))
            overview.lengths += np.histogram(lengths, LENGTHS)[0]
            overview.longest = max(overview.longest, int(lengths.max()))
            for kind, sizes in overview.sizes.items():
                of_kind = rows[rows["kind"] == kind]
                counts, *_ = np.histogram2d(of_kind["width"], of_kind["height"], (SIDES, SIDES))
                sizes += counts.astype(np.int64)
            seconds = rows["duration_ms"][rows["kind"] == MediaKind.VIDEO] / 1000
            seconds = seconds.clip(DURATIONS_S[0], DURATIONS_S[-1])
            overview.durations += np.histogram(seconds, DURATIONS_S)[0]
        return overview


def draw_overview(dataset: Dataset, file: Path) -> None:
    """Count, and draw a panel for lengths, one for the sizes of each kind there is, and durations.

    Args:
        dataset: that was prepared.
        file: the picture.
    """
    from matplotlib.figure import Figure  # late, and needs no display

    overview = Overview.of(dataset)
    shown = {kind: sizes for kind, sizes in overview.sizes.items() if sizes.any()}
    num_panels = 1 + len(shown) + bool(overview.durations.any())
    figure = Figure(figsize=(4.6 * num_panels, 4.0), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False).flat)
    title = f"{len(dataset):,} samples, the longest of {overview.longest:,}"
    _bars(panels.pop(0), overview.lengths, LENGTHS, title, "text tokens")
    for kind, sizes in shown.items():
        _map(panels.pop(0), sizes, f"{sizes.sum():,} {kind.name.lower()}s")
    for panel in panels:
        _bars(panel, overview.durations, DURATIONS_S, "how long the videos are", "seconds")
    figure.savefig(file, dpi=120)


def _bars(
    axes: Any, counts: NDArray[np.int64], bounds: NDArray[np.float64], title: str, label: str
) -> None:
    axes.bar(bounds[:-1], counts, np.diff(bounds), align="edge", color=BLUE)
    low, high = _occupied(counts)
    axes.set_xscale("log", base=2)
    axes.set_xlim(bounds[low], bounds[high])
    axes.xaxis.set_major_formatter(_plain)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel=label, ylabel="how many")
    axes.spines[["top", "right"]].set_visible(False)


def _map(axes: Any, sizes: NDArray[np.int64], title: str) -> None:
    from matplotlib.colors import LogNorm

    low, high = _occupied(sizes.sum(axis=0) + sizes.sum(axis=1))
    shown = np.where(sizes > 0, sizes, np.nan)
    norm = LogNorm(vmin=0.3, vmax=max(sizes.max(), 3))  # a single one is no longer white
    mesh = axes.pcolormesh(SIDES, SIDES, shown.T, cmap="Blues", norm=norm)
    axes.figure.colorbar(mesh, ax=axes, label="how many")
    for side, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        getattr(axes, f"set_{side}scale")("log", base=2)
        getattr(axes, f"set_{side}lim")(SIDES[low], SIDES[high])
        axis.set_major_formatter(_plain)
    axes.set(title=title, xlabel="width in pixels", ylabel="height in pixels")
    axes.set_aspect("equal")


def _occupied(counts: NDArray[np.int64]) -> tuple[int, int]:
    """The bounds around all bins that have something, and a bin more on either side."""
    there = np.flatnonzero(counts)
    return max(int(there[0]) - 1, 0), min(int(there[-1]) + 2, len(counts))


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"

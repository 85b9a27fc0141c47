"""The demo's two pictures: how the loss fell, and what the model reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triptych.data.digits.images import heldout_images
from triptych.data.digits.texts import READ
from triptych.launch.digits.evaluate import Reading

CURVES, SHEET = "loss_curves.png", "contact_sheet.png"
ROWS, COLUMNS = 4, 8
SMOOTHING = 0.9
RIGHT, WRONG = "#1a7f37", "#b3261e"


def loss_curves(runs: Sequence[Path], folder: Path) -> Path:
    """Draw the training loss of each run over its tokens, side by side on one scale.

    Returns:
        The picture.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(
        1, len(runs), figsize=(3.4 * len(runs), 3.4), sharey=True, squeeze=False
    )
    for panel, run in zip(panels[0], runs, strict=True):
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [step for step in steps if step["loss"] is not None]
        tokens = [step["consumed_tokens"] / 1e6 for step in steps]
        losses = [step["loss"] for step in steps]
        panel.plot(tokens, losses, color="#9db7d5", linewidth=0.7)
        panel.plot(tokens, smoothed(losses), color="#1f4e8c", linewidth=1.8)
        panel.set_title(steps[0]["stage"])
        panel.set_xlabel("million tokens")
        panel.set_yscale("log")
        panel.grid(alpha=0.25, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("loss per supervised token")
    return _save(plt, figure, folder / CURVES)


def contact_sheet(readings: Sequence[Reading], folder: Path, *, seed: int) -> Path:
    """Draw the first pictures to scale, each with question, answer and the model's reading.

    Args:
        readings: of ``heldout_images(len(readings), seed)``.
        folder: gets the picture.
        seed: of the pictures.

    Returns:
        The picture.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(ROWS, COLUMNS, figsize=(1.55 * COLUMNS, 2.05 * ROWS))
    shown = list(zip(heldout_images(len(readings), seed), readings, strict=True))
    side = max(max(picture.image.size) for picture, _ in shown)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, (picture, reading) in zip(panels.flat, shown, strict=False):
        width, height = picture.image.size
        panel.imshow(picture.image, cmap="gray", vmin=0, vmax=255)
        panel.set_xlim((width - side) / 2, (width + side) / 2)  # all on one scale
        panel.set_ylim((height + side) / 2, (height - side) / 2)
        new = ", a new size" if reading.size_is_unseen else ""
        panel.set_title(f"{width}x{height}{new}\nshows {reading.truth}", fontsize=8, pad=3)
        panel.text(
            0.5,
            -0.02,
            f"reads {reading.answer or 'nothing'}",
            transform=panel.transAxes,
            ha="center",
            va="top",
            fontsize=11,
            fontweight="bold",
            color=RIGHT if reading.is_right else WRONG,
        )
    right = sum(reading.is_right for reading in readings)
    figure.suptitle(
        f"“{READ}”  {right} of {len(readings)} pictures of scans that training never showed "
        f"are read exactly; the first {min(len(readings), ROWS * COLUMNS)}",
        fontsize=11,
    )
    return _save(plt, figure, folder / SHEET)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average that starts at the first value."""
    averages: list[float] = []
    for value in values:
        last = averages[-1] if averages else value
        averages.append(SMOOTHING * last + (1 - SMOOTHING) * value)
    return averages


def _pyplot() -> Any:
    """Matplotlib without a display; imported late, for it is slow to load."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path

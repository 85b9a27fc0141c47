"""The page: one HTML file with everything in it, and nothing that it fetches."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from triptych.launch.reporting.facts import differences, facts, progress, shares
from triptych.launch.reporting.figures import sections
from triptych.launch.reporting.run_record import RunRecord
from triptych.launch.reporting.timeline import timeline

TEMPLATE = "page.html.jinja"
WIDEST_PICTURE = 1400
"""Pixels; larger ones are reduced, so that the page stays small."""
SMALL_FROM = 2
"""With more stages, a chart of each stands beside those of the others, small."""
QUALITY = 70
"""Of the WebP that pictures become."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A picture of samples, as the page holds it."""

    name: str
    uri: str
    """With the bytes in it; empty where the file cannot be read."""
    width: int
    height: int


def render(runs: Sequence[RunRecord], sheets: Sequence[Path], now: datetime) -> str:
    """The page of one run, or of several that are compared.

    Args:
        runs: as they were read.
        sheets: pictures of samples beside those of the runs.
        now: when they were read.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = [*sheets, *(path for run in runs for path in run.sheets)]
    return environment.get_template(TEMPLATE).render(
        runs=runs,
        now=f"{now:%Y-%m-%d %H:%M:%S %Z}",
        facts=[facts(run, now) for run in runs],
        progress=[progress(run) for run in runs],
        shares=[shares(run) for run in runs],
        sections=sections(runs),
        is_small=len({run.steps.stage for run in runs}) > SMALL_FROM,
        timelines=[timeline(run) for run in runs],
        differences=differences(runs),
        sheets=[_sheet(path) for path in pictures],
    )


def _sheet(path: Path) -> Sheet:
    """The picture, made smaller."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return Sheet(str(path), "", 0, 0)
    image.thumbnail((WIDEST_PICTURE, 4 * WIDEST_PICTURE))
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=QUALITY)
    content = base64.b64encode(file.getvalue()).decode()
    return Sheet(str(path), f"data:image/webp;base64,{content}", *image.size)

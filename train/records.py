"""The names of what a run records step by step in ``run.dir``, for whoever writes or reads it.

Waits for nothing that is slow to import: readers are commands.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

METRICS = "metrics.jsonl"
"""A line of numbers for each step."""
QUARANTINE = "quarantine"
"""The folder of the samples that could not be read, a file for each dp rank that had any."""


def flatten(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name.

    Those of a group as ``group/name``. Texts and missing values are left out.
    """
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": number for inner, number in flatten(value).items()}
        elif isinstance(value, Real):
            flat[name] = float(value)
    return flat

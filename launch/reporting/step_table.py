"""``metrics.jsonl`` as columns of numbers."""

from array import array
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triptych.train.json_lines import read_lines
from triptych.train.records import flatten

Numbers = NDArray[np.float64]
LARGEST_STEP = 2**53
"""A larger number is no step: a bit flipped, and float64 cannot tell it from the next."""


class StepTable:
    """One row for each step that was read, one column for each number that a metric has.

    Numbers of a group are named ``group/name``, as ``lr/vit``; ``time`` is in seconds since 1970.
    """

    def __init__(self, columns: dict[str, Numbers], stage: str, num_unreadable_lines: int) -> None:
        self._columns = columns
        self.stage = stage
        """As the last line names it; empty where there is none."""
        self.num_unreadable_lines = num_unreadable_lines

    def __len__(self) -> int:
        return len(self._columns.get("step", ()))

    def __getitem__(self, name: str) -> Numbers:
        """(num_steps,), NaN where a step has no such number."""
        return self._columns.get(name, np.full(len(self), np.nan))

    @property
    def names(self) -> list[str]:
        """Of the columns that have a number."""
        return [name for name, column in self._columns.items() if np.isfinite(column).any()]

    def last(self, name: str) -> float | None:
        """The newest number of a column; None where it has none."""
        known = self[name][np.isfinite(self[name])]
        return float(known[-1]) if len(known) else None


def read_step_table(path: Path) -> StepTable:
    """The steps in a file that may be missing, damaged, or still growing."""
    columns: dict[str, array[float]] = {}
    stage, num_rows = "", 0
    for line in read_lines(path) if path.exists() else ():
        try:
            row = flatten({**line, "time": _seconds(line.get("time"))})
        except OverflowError:  # a number of hundreds of digits
            continue
        if not 0 <= row["step"] <= LARGEST_STEP:
            continue
        for name in row:
            if name not in columns:
                columns[name] = array("d", [np.nan]) * num_rows
        for name, column in columns.items():
            column.append(row.get(name, np.nan))
        stage, num_rows = str(line.get("stage", stage)), num_rows + 1
    table = {name: np.frombuffer(column) for name, column in columns.items()}
    return StepTable(table, stage, num_lines(path) - num_rows)


def num_lines(path: Path) -> int:
    """Whole lines of a file; 0 where there is none. One that is being written does not count."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def _seconds(time: object) -> float | None:
    """Since 1970, of ``2026-11-28T19:45:25.620+00:00``; None of anything else."""
    try:
        return datetime.fromisoformat(time).timestamp() if isinstance(time, str) else None
    except ValueError:
        return None

"""What a benchmark hands to the table at the end: a claim, the figure measured, and its bar."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One claim."""

    claim: str
    figure: str
    bar: str
    met: bool
    command: str


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, least and largest."""
    of = (statistics.median(values), min(values), max(values))
    return "{} ({} to {})".format(*(f"{value:.{digits}f}" for value in of))


def print_rows(rows: Sequence[Row]) -> None:
    """The row as Markdown."""
    print("\n| claim | measured | bar | | command |\n|---|---|---|---|---|")
    for row in rows:
        verdict = "met" if row.met else "NOT MET"
        print(f"| {row.claim} | {row.figure} | {row.bar} | {verdict} | `{row.command}` |")


def finish(rows: Sequence[Row]) -> None:
    """Print the rows, and end the process with exit code 1 where a bar is not met."""
    print_rows(rows)
    if not all(row.met for row in rows):
        sys.exit(1)

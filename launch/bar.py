"""A bar that moves while something lasts: how much is done, how fast, how long it still takes."""

import sys
import time

WIDTH = 24
ON_TERMINAL_S, IN_FILE_S = 0.2, 10.0
"""Seconds between two states: a terminal's line is written over, a file gets a line for each."""


class Bar:
    """Prints to stdout; made when the work begins."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._start = self._shown = time.monotonic()

    def show(self, done: int, total: int) -> None:
        """Print the state, unless the last one is recent; the end is always told."""
        now, rewrites = time.monotonic(), sys.stdout.isatty()
        if done < total and now - self._shown < (ON_TERMINAL_S if rewrites else IN_FILE_S):
            return
        self._shown = now
        end = "\r" if rewrites and done < total else "\n"
        print(state(done, total, now - self._start, self._unit), end=end, flush=True)


def state(done: int, total: int, elapsed_s: float, unit: str) -> str:
    """As ``[######------]  50 %  500/1,000 pictures  40/s  left 13 s``."""
    filled = WIDTH * done // max(1, total)
    rate = done / max(elapsed_s, 1e-9)
    left = f"left {(total - done) / rate:.0f} s" if done else "left ? s"
    return (
        f"[{'#' * filled}{'-' * (WIDTH - filled)}] {100 * done // max(1, total):3d} %  "
        f"{done:,}/{total:,} {unit}  {rate:,.0f}/s  "
        f"{left if done < total else f'took {elapsed_s:.0f} s'}   "
    )

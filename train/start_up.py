"""What a start takes until the first step, by part."""

import time
from collections.abc import Mapping

import psutil


class StartUp:
    """Seconds of each part of a start, one after the other, from this process's beginning on."""

    def __init__(self) -> None:
        self.begun = psutil.Process().create_time()
        """Unix time."""
        self._last = self.begun
        self._parts_s: dict[str, float] = {}

    def done(self, part: str) -> None:
        """What was done since the part before was this one."""
        now = time.time()
        self._parts_s[part], self._last = max(0.0, now - self._last), now

    @property
    def parts_s(self) -> Mapping[str, float]:
        """Part -> seconds, to the hundredth."""
        return {part: round(seconds, 2) for part, seconds in self._parts_s.items()}

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self._parts_s.items())
        return f"{sum(self._parts_s.values()):.1f} s ({parts})"

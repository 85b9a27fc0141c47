"""While a storage answers nothing, one thread of a process asks it, and the others wait.

Unlike most breakers it fails nothing: whoever waits gets a turn, and only an attempt of its own
that fails can end its patience.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

OPEN_AFTER = 8
"""Failures in a row, of all threads."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 20.0
"""Before each attempt while it is open; doubled each time, and jittered."""


class Breaker:
    """Of one storage, for the threads of one process."""

    def __init__(self) -> None:
        self._failures = 0
        self._one_asks = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One attempt, as soon as it may be made."""
        while self._is_open:
            with self._one_asks:
                if self._is_open:  # still, after those who had their turn before
                    doublings = min(10, self._failures - OPEN_AFTER)
                    longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**doublings)
                    time.sleep(random.uniform(longest_s / 2, longest_s))
                    yield
                    return
        yield

    def failed(self) -> None:
        """An attempt was not answered, or by an error that may pass."""
        self._failures += 1

    def answered(self) -> None:
        """The storage is there."""
        self._failures = 0

    @property
    def _is_open(self) -> bool:
        return self._failures >= OPEN_AFTER

"""A second request beside one that takes longer than most; the first of them that ends counts.

A single slow server or connection then costs a second request, not the step of a whole job. The
share of requests that are doubled has a cap, so a storage that is slow as a whole is not asked
twice for everything.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import TypeVar

SHARE = 0.05
"""Of the requests, at most, that are asked twice."""
QUANTILE = 0.95
"""Of the latest requests, that took less than it takes until one is asked twice."""
LEAST_S = 0.2
LEAST_SEEN, LATEST = 32, 256
"""Requests that must have ended before any is doubled, and that are remembered."""

T = TypeVar("T")


class Hedge:
    """Of one storage, for the threads of one process."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=LATEST)
        self._asked = self._doubled = 0

    def first(self, request: Callable[[], T], take_turn: Callable[[], None]) -> T:
        """What ``request`` returns or raises, by whichever of two attempts ends first.

        Args:
            request: asks once. May run twice at a time, in threads that nobody waits for at exit.
            take_turn: waits until a second one may begin.
        """
        ended: SimpleQueue[Callable[[], T]] = SimpleQueue()
        self._asked += 1
        started = monotonic()
        _begin(request, ended)
        try:
            result = ended.get(timeout=self._patience_s())
        except Empty:
            if self._doubled < SHARE * self._asked:
                self._doubled += 1
                take_turn()
                _begin(request, ended)
            result = ended.get()
        self._seconds.append(monotonic() - started)
        return result()

    def _patience_s(self) -> float | None:
        """How long an attempt may take; None before enough is known."""
        if len(self._seconds) < LEAST_SEEN:
            return None
        seconds = sorted(self._seconds)
        return max(LEAST_S, seconds[int(QUANTILE * len(seconds))])


def _begin(request: Callable[[], T], ended: "SimpleQueue[Callable[[], T]]") -> None:
    """Run it in a thread, which leaves a function that returns or raises what came of it."""

    def attempt() -> None:
        future: Future[T] = Future()
        try:
            future.set_result(request())
        except BaseException as error:  # whoever waits raises it
            future.set_exception(error)
        ended.put(future.result)

    Thread(target=attempt, name="ask-storage", daemon=True).start()

"""A clock that a test moves, in place of the module ``time`` of what it tests."""


class Clock:
    """It stands still between two calls of ``sleep``, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """Seconds, as ``time.perf_counter``."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Be later at once."""
        self.now += seconds

    def thread_time(self) -> float:
        """Seconds that this thread computed: all that pass."""
        return self.now

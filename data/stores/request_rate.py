"""A limit on requests per second that all processes of a node keep together.

The time at which the next request may begin lies in a small file that they lock. A job has its
limit divided by its nodes: they have no file in common that is fast enough.

A thread that finds others of its process waiting takes their turns with its own, so the file is
locked by one thread a process. With 32 in its queue on a busy machine, each handing over waits to
be scheduled: reads then spent 0.94 s of 1.04 s in that queue, and 31/s were begun of 142.5/s.
"""

import fcntl
import hashlib
import os
import struct
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

BURST = 4
"""Requests that may begin at once after a pause."""
_NEXT = struct.Struct("<d")


class RequestRate:
    """Tokens of a bucket, one for each request. Threads, processes and forks share it."""

    def __init__(self, what: str, per_second: float) -> None:
        """Opens nothing yet.

        Args:
            what: the limit is one of; whoever names the same shares it.
            per_second: requests of this node.
        """
        name = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
        self._path = Path(tempfile.gettempdir()) / f"triptych-rate-{os.getuid()}-{name}"
        self._interval_s = 1 / per_second
        self._forget()
        os.register_at_fork(after_in_child=self._forget)  # threads that wait stay with the parent

    def take(self) -> None:
        """Wait for a token."""
        turn: list[float] = []
        self._waiting.append(turn)
        with self._at_file:
            if not turn:  # or another thread has taken it
                count = len(self._waiting)
                first = self._move(count * self._interval_s)  # if it fails, all still wait
                for number in range(count):
                    self._waiting.popleft().append(first + number * self._interval_s)
        time.sleep(max(0.0, turn[0] - time.monotonic()))

    def hold(self, seconds: float) -> None:
        """Give no token for some time: the server has asked for it."""
        self._move(0.0, not_before=time.monotonic() + seconds)

    def _forget(self) -> None:
        self._at_file, self._waiting = threading.Lock(), deque[list[float]]()

    def _move(self, step_s: float, not_before: float = 0.0) -> float:
        """Move the time of the next request; returns what it was."""
        with open(self._path, "a+b", buffering=0) as file:  # flock is per open file: one a thread
            fcntl.flock(file, fcntl.LOCK_EX)
            content = os.pread(file.fileno(), _NEXT.size, 0)
            now = time.monotonic()  # of the node, not of the process
            [found] = _NEXT.unpack(content) if len(content) == _NEXT.size else [0.0]
            if found > now + 3600:  # of before a reboot
                found = 0.0
            turn = max(found, now - BURST * self._interval_s, not_before)
            file.truncate(0)
            file.write(_NEXT.pack(turn + step_s))
        return turn

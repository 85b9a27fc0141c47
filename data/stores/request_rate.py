"""A limit on requests per second that all processes of a node keep together.

The time at which the next request may begin lies in a small file that they lock. A job has its
limit divided by its nodes: they have no file in common that is fast enough.
"""

import fcntl
import hashlib
import os
import struct
import tempfile
import time
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

    def take(self) -> None:
        """Wait for a token."""
        time.sleep(self._move(self._interval_s))

    def hold(self, seconds: float) -> None:
        """Give no token for some time: the server has asked for it."""
        self._move(0.0, not_before=time.monotonic() + seconds)

    def _move(self, step_s: float, not_before: float = 0.0) -> float:
        """Move the time of the next request; returns the seconds until what it was."""
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
        return max(0.0, turn - now)

"""Processes that decode videos, and what is known when one of them dies.

A damaged file can crash a decoder, or keep it busy for ever. So each thread that needs frames
borrows a process of ``data/media/video_file.py``; a process serves many files, and one that dies
takes the file with it that it had, not the run. It ends itself where it does not move, and it ends
when we do. One that was killed was killed by others: its file is decoded anew.
"""

import atexit
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from triptych.data.media.image import MAX_DECODED_PIXELS
from triptych.data.types import Clip
from triptych.errors import ConfigError, DataError

COMMAND = (sys.executable, "-P", "-m", "triptych.data.media.video_file")
CPU_S = 30.0
"""CPU-seconds in which one packet must be decoded. So a decision does not depend on what else runs,
and a film may be long."""
WALL_S = 300.0
"""Seconds for the same; only a decoder that waits for something meets them first."""
TRIES = 3
"""Processes that a file is given while they are killed."""
NOT_FOR_DECODERS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""By which a run is asked to stop. A terminal sends them to its whole process group, Slurm to every
process of a job; a decoder that ended by one would make its file a bad one."""
Decoded = TypeVar("Decoded")


class DecoderKilledError(DataError):
    """SIGKILL ended a decoder: no file does that, but a kernel that runs out of memory."""


class VideoDecoder:
    """A process that decodes one file at a time."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        """Starts it, with the signals that are for us alone blocked from its first moment on."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_DECODERS)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert isinstance(self._process.stdin, io.BufferedWriter)
        assert isinstance(self._process.stdout, io.BufferedReader)
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def extent(self, data: bytes, where: str, clip: Clip | None = None) -> dict[str, int]:
        """Decodes a whole file: its ``width``, ``height``, ``frames`` and ``duration_ms``.

        Args:
            data: the file.
            where: names it in errors.
            clip: whose frames and duration are asked for, and ``start_ms``; None for all.
        Raises:
            DataError: it cannot be decoded, or has no such clip.
        """
        self._ask(data, {"num_frames": 0, "clip": clip})
        extent: dict[str, int] = self._answer(where)["extent"]
        return extent

    def frames(
        self, data: bytes, wanted: dict[str, int], where: str
    ) -> Iterator[NDArray[np.uint8]]:
        """Some frames of a video, (height, width, 3) upright RGB each. Take them all, or ``kill``.

        Args:
            data: the file.
            wanted: ``num_frames`` evenly spread over the ``frames`` and ``duration_ms`` from
                ``start_ms`` on.
            where: names it in errors.
        Raises:
            DataError: it cannot be decoded.
        """
        self._ask(data, wanted)
        while "done" not in (answer := self._answer(where)):
            frame = np.empty((*answer["frame"], 3), dtype=np.uint8)
            if self._answers.readinto(frame.reshape(-1).data) < frame.size:
                self._raise_ending(where)
            yield frame

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with suppress(OSError):  # of what was not yet written
                pipe.close()

    def _ask(self, data: bytes, request: Mapping[str, Any]) -> None:
        limits = {"max_pixels": MAX_DECODED_PIXELS, "cpu_s": CPU_S, "wall_s": WALL_S}
        line = json.dumps({**request, **limits, "num_bytes": len(data)}).encode()
        with suppress(BrokenPipeError):  # that it died, its answer says
            self._requests.write(line + b"\n")
            self._requests.write(data)
            self._requests.flush()

    def _answer(self, where: str) -> dict[str, Any]:
        line = self._answers.readline()
        if not line.endswith(b"\n"):
            self._raise_ending(where)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise DataError(f"{where}: cannot be decoded as a video: {answer['error']}")
        return answer

    def _raise_ending(self, where: str) -> None:
        code = self._process.wait()
        if code >= 0:
            raise ConfigError(
                f"the decoder of videos ended with exit code {code}; what it printed stands above"
                f"  -> {' '.join(COMMAND[1:])} must start"
            )
        ended = signal.Signals(-code)
        if ended is signal.SIGKILL:
            raise DecoderKilledError(
                f"{where}: not decoded: {TRIES} decoders were killed (SIGKILL), as by a kernel "
                "that runs out of memory  -> see dmesg on this node; take fewer data.num_workers"
            )
        reason = f"it ended the decoder by signal {ended.name}"
        if ended is signal.SIGPROF:
            reason = f"the decoder did not move for {CPU_S:g} CPU-seconds"
        if ended is signal.SIGALRM:
            reason = f"the decoder did not move for {WALL_S:g} seconds"
        raise DataError(f"{where}: cannot be decoded as a video: {reason}")


_idle: list[VideoDecoder] = []
"""Processes that nobody has borrowed; as many as were ever needed at once."""


def decode(work: Callable[[VideoDecoder], Decoded]) -> Decoded:
    """What ``work`` makes of one file; it may be called up to ``TRIES`` times.

    Else what a step reads would depend on how much memory a node had at that moment.

    Raises:
        DataError: the file cannot be decoded, or each of its decoders was killed.
    """
    for _ in range(TRIES - 1):
        with suppress(DecoderKilledError), borrowed_decoder() as decoder:
            return work(decoder)
    with borrowed_decoder() as decoder:
        return work(decoder)


@contextmanager
def borrowed_decoder() -> Iterator[VideoDecoder]:
    """A process for one file. Threads may call this; a process that failed serves no other file."""
    try:
        decoder = _idle.pop()
    except IndexError:
        decoder = VideoDecoder()
    try:
        yield decoder
    except BaseException:
        decoder.kill()
        raise
    _idle.append(decoder)


def _kill_idle() -> None:
    while _idle:
        _idle.pop().kill()


atexit.register(_kill_idle)
os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's

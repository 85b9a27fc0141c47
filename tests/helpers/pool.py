"""Gloo ranks that outlive the tests they run: one pool per world size, started at its first case.

    def check_sum(start):                                  # at the top level of a test module
        value = torch.tensor(start + dist.get_rank())
        dist.all_reduce(value)
        return int(value)

    def test_sum(pool):
        assert pool(4).run(check_sum, start=1) == [10] * 4

The ranks are forks of one server that has imported torch and megatron-core once
(``pool_preload.py``), so a pool starts, and starts again, in a fraction of a second; ranks with
pretended CUDA devices are those of another server (``pretend_preload.py``). Arguments and
results travel pickled; a rank finds the function by file and name. A rank that raises, dies or
stands still ends the pool, and the next case gets a new one: no case inherits a broken group.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.pool_rank import FORGET, PoolCall, Raised, Returned, serve

PRELOAD = "triptych.tests.helpers.pool_preload"
PRETEND_PRELOAD = "triptych.tests.helpers.pretend_preload"
"""Of ranks that have CUDA devices."""
GRACE_S = 1.0
"""How long the others may go on after one rank has failed: enough to fail for the same reason."""
STACK_TIMEOUT_S = 60.0
STACK_ENDS = ("in <module>\n", "...\n")
"""How faulthandler's stack ends: with its outermost frame, or cut off."""
OUTPUT_TAIL_CHARS = 4000


class RankFailureError(Exception):
    """A case failed. The message holds each rank's traceback or stack, and what it printed."""


@dataclass(frozen=True, slots=True)
class RankDied:
    """The process of this rank ended in the middle of a case."""

    exitcode: int | None


RankAnswer = Returned | Raised | RankDied


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of the pool, seen from pytest."""

    index: int
    process: multiprocessing.process.BaseProcess
    connection: Connection
    log: Path
    stack: Path

    def receive(self) -> RankAnswer:
        """What the rank answered, or how it ended. Call when connection or sentinel is ready."""
        try:
            if self.connection.poll():
                outcome: Returned | Raised = pickle.loads(self.connection.recv_bytes())
                return outcome
        except (EOFError, ConnectionError):
            pass
        self.process.join(timeout=HANG_S)  # it is ending: on a busy machine that takes a while
        return RankDied(self.process.exitcode)

    def dump_stack(self) -> str:
        """The Python stack of the rank's main thread, most recent call first."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR2)
        deadline = time.monotonic() + STACK_TIMEOUT_S
        while self.process.is_alive() and time.monotonic() < deadline:
            if self.stack.read_text().endswith(STACK_ENDS):
                break
            time.sleep(0.01)
        return self.stack.read_text() or "  (no stack: the process does not answer signals)\n"

    def kill(self) -> None:
        """End the rank and the processes it started; they share its process group."""
        with contextlib.suppress(
            ProcessLookupError
        ):  # it ended, or did not come as far as having a group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


@functools.cache
def fork_server(preload: str) -> forkserver.ForkServer:
    """The server whose forks have imported this module. multiprocessing itself has one only."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["pytest", preload])
    return server


class RankPool:
    """``world_size`` ranks with a gloo group, which run one case after another."""

    def __init__(self, world_size: int, folder: Path, preload: str = PRELOAD) -> None:
        self.world_size = world_size
        self._folder = folder
        self._server = fork_server(preload)
        self._ranks: list[Rank] = []
        # Without this, an interpreter that ends without stop() would wait for its ranks for ever.
        atexit.register(self.stop)

    def run(
        self,
        function: Callable[..., Any],
        /,
        *,
        timeout_s: float = HANG_S,
        grace_s: float = GRACE_S,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``function(**kwargs)`` on every rank.

        Args:
            function: a module-level function; the default process group is up when it is called.
            timeout_s: how long the case may take, on all ranks together.
            grace_s: how long the others may go on after one rank has failed.
            **kwargs: picklable arguments, the same for every rank.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankFailureError: a rank raised, died, or did not finish in time.
        """
        case = PoolCall.of(function, kwargs)
        message = pickle.dumps(case)
        if not self._ranks:
            self._start()
        try:
            for rank in self._ranks:
                rank.log.write_text("")
                with contextlib.suppress(
                    BrokenPipeError
                ):  # it died after its last answer: _collect says so
                    rank.connection.send_bytes(message)
            task = f"{Path(case.file).name}::{case.qualname}"
            results = self._collect(task, timeout_s, grace_s)
        except BaseException:  # a failed case, or pytest-timeout or Ctrl-C in the middle of one
            self.stop()
            raise
        for rank in self._ranks:
            with contextlib.suppress(BrokenPipeError):
                rank.connection.send_bytes(FORGET)
        return results

    def stop(self) -> None:
        """Kill the ranks, if there are any: they hold nothing worth saving."""
        for rank in self._ranks:
            rank.kill()
        self._ranks = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        (self._folder / "rendezvous").mkdir(parents=True)
        context = multiprocessing.get_context("forkserver")
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        environment = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": loopback,
        }
        with mock.patch.dict(os.environ, environment):
            for index in range(self.world_size):
                self._ranks.append(self._start_rank(context, index))
        try:
            self._collect("the start of the pool", HANG_S, GRACE_S)
        except BaseException:
            self.stop()
            raise

    def _start_rank(self, context: multiprocessing.context.ForkServerContext, index: int) -> Rank:
        log, stack = self._folder / f"rank{index}.log", self._folder / f"rank{index}.stack"
        ours, theirs = multiprocessing.Pipe()
        arguments = (index, self.world_size, theirs, log, stack, self._folder / "rendezvous")
        process = context.Process(
            target=serve, args=arguments, name=f"rank {index} of {self.world_size}"
        )
        connect = self._server.connect_to_new_process
        with mock.patch.object(forkserver, "connect_to_new_process", connect):
            process.start()
        theirs.close()  # so that the death of the rank closes the connection
        return Rank(index, process, ours, log, stack)

    def _collect(self, task: str, timeout_s: float, grace_s: float) -> list[Any]:
        """Wait for every rank's answer; once one has failed, the others have ``grace_s`` left."""
        outcomes: dict[int, RankAnswer] = {}
        deadline = time.monotonic() + timeout_s
        while len(outcomes) < self.world_size:
            pending = [rank for rank in self._ranks if rank.index not in outcomes]
            handles = {
                handle: rank
                for rank in pending
                for handle in (rank.connection, rank.process.sentinel)
            }
            ready = wait(list(handles), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for index in {handles[handle].index for handle in ready}:
                outcomes[index] = self._ranks[index].receive()
                if not isinstance(outcomes[index], Returned):
                    deadline = min(deadline, time.monotonic() + grace_s)
        returned = [
            outcomes[index] for index in sorted(outcomes) if isinstance(outcomes[index], Returned)
        ]
        if len(returned) < self.world_size:
            raise RankFailureError(self._report(task, outcomes, timeout_s))
        return [pickle.loads(outcome.value) for outcome in returned]

    def _report(self, task: str, outcomes: dict[int, RankAnswer], timeout_s: float) -> str:
        failed = [index for index, outcome in outcomes.items() if not isinstance(outcome, Returned)]
        if failed:
            lines = [
                f"{task} failed on rank {', '.join(map(str, sorted(failed)))} of {self.world_size}"
            ]
        else:
            lines = [f"{task} did not finish within {timeout_s:g} s"]
        # The first to fail comes first: what the others say is often its echo.
        for index in (*failed, *(rank.index for rank in self._ranks if rank.index not in failed)):
            match outcomes.get(index):
                case Raised(traceback):
                    lines += [f"--- rank {index} raised", traceback]
                case RankDied(exitcode):
                    lines += [
                        f"--- rank {index} died, exit code {exitcode}",
                        self._ranks[index].stack.read_text(),
                    ]
                case None:
                    lines += [f"--- rank {index} was still here", self._ranks[index].dump_stack()]
                case Returned():
                    lines += [f"--- rank {index} had returned"]
        for rank in self._ranks:
            output = rank.log.read_text(errors="replace") if rank.log.exists() else ""
            if output:
                lines += [f"--- rank {rank.index} printed", output[-OUTPUT_TAIL_CHARS:]]
        return "\n".join(lines)

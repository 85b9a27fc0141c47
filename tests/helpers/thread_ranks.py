"""Ranks as threads of one process: for what agrees without torch."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triptych.tests.helpers.limits import HANG_S


class ThreadRanks:
    """Ranks as threads of one process."""

    def __init__(
        self, rank: int, world_size: int, barrier: threading.Barrier, board: dict[int, Any]
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._barrier, self._board = barrier, board

    def all_gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(timeout=HANG_S)
        values = [self._board[rank] for rank in range(self.world_size)]
        self._barrier.wait(timeout=HANG_S)
        return values

    def add_up(self, counts: Sequence[int]) -> list[int]:
        return [sum(column) for column in zip(*self.all_gather(counts), strict=True)]


def on_ranks(world_size: int, action: Callable[[ThreadRanks], Any]) -> list[Any]:
    """Results of ``action`` on every rank, an exception standing for itself."""
    barrier, board = threading.Barrier(world_size), {}
    with ThreadPoolExecutor(world_size) as pool:
        futures = [
            pool.submit(action, ThreadRanks(rank, world_size, barrier, board))
            for rank in range(world_size)
        ]
    return [future.exception() or future.result() for future in futures]

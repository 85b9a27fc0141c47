"""Ranks that agree on an outcome.

Did all succeed, which of them differ, where is something so: every rank gets the same answer, and
the same error. This module imports no torch, for tools that need none.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from triptych.errors import TriptychError

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks that decide something together."""

    rank: int
    world_size: int

    def all_gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every rank, by rank. Every rank must call this."""

    def add_up(self, counts: Sequence[int]) -> list[int]:
        """The sum of each count over the ranks. Every rank must call this."""


class SingleProcess:
    """One process, for tools and tests."""

    rank = 0
    world_size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]

    def add_up(self, counts: Sequence[int]) -> list[int]:
        """The counts themselves."""
        return list(counts)


class ProcessGroupRanks:
    """The ranks of a torch process group, all of them by default."""

    def __init__(self, group: Any = None) -> None:
        import torch  # late: see above
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.world_size: int = dist.get_world_size(group)

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank. Every rank of the group must call this."""
        values: list[Any] = [None] * self.world_size
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def add_up(self, counts: Sequence[int]) -> list[int]:
        """The sum of each count, over a group that has gloo. Every rank of it must call this."""
        total = self._torch.tensor(counts, dtype=self._torch.int64)
        self._dist.all_reduce(total, group=self._group)
        return [int(number) for number in total]


def on_every_rank(
    ranks: Ranks, action: Callable[[], T], *, os_error: type[TriptychError]
) -> list[T]:
    """Run ``action`` on every rank and gather the results, by rank. Every rank must call this.

    Args:
        ranks: who runs it.
        action: fails with a ``TriptychError`` or an ``OSError``; others end this rank alone.
        os_error: what an ``OSError`` is raised as.

    Raises:
        TriptychError: on every rank alike, if the action failed on any; names each rank that
            failed, and is of the type of the first.
    """
    outcomes: list[_Outcome] = ranks.all_gather(_attempt(action, os_error))
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome.error is not None]
    if failed:
        reasons = [f"rank {rank}: {outcomes[rank].reason}" for rank in failed]
        raise cast(type[TriptychError], outcomes[failed[0]].error)("\n".join(reasons))
    return [outcome.result for outcome in outcomes]


def on_rank_0(ranks: Ranks, action: Callable[[], T], *, os_error: type[TriptychError]) -> T:
    """Run ``action`` on rank 0 and give its result to all. Every rank must call this.

    Args:
        ranks: who gets the result.
        action: fails with a ``TriptychError`` or an ``OSError``; others end rank 0 alone.
        os_error: what an ``OSError`` is raised as.

    Raises:
        TriptychError: on every rank alike, if the action failed; of the type with which it did.
    """
    outcome = ranks.all_gather(_attempt(action, os_error) if ranks.rank == 0 else None)[0]
    if outcome.error is not None:
        raise outcome.error(outcome.reason)
    return cast(T, outcome.result)


def differing_ranks(ranks: Ranks, value: Any) -> list[int]:
    """The ranks whose ``value`` is not that of rank 0. Every rank must call this."""
    values = ranks.all_gather(value)
    return [rank for rank, other in enumerate(values) if other != values[0]]


def ranks_where(ranks: Ranks, condition: bool) -> list[int]:
    """The ranks on which ``condition`` holds. Every rank must call this."""
    return [rank for rank, holds in enumerate(ranks.all_gather(condition)) if holds]


class _Outcome(NamedTuple):
    """What came of an action on one rank."""

    result: Any
    error: type[TriptychError] | None
    reason: str


def _attempt(action: Callable[[], Any], os_error: type[TriptychError]) -> _Outcome:
    try:
        return _Outcome(action(), None, "")
    except TriptychError as error:
        return _Outcome(None, type(error), str(error))
    except OSError as error:
        return _Outcome(None, os_error, str(error) or type(error).__name__)

"""How the ranks of a run agree: on a name, a list of files, or a verdict."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from triptych.errors import CheckpointError

T = TypeVar("T")


class Comm(Protocol):
    """The ranks that write and read checkpoints together."""

    rank: int
    world_size: int

    def all_gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every rank, by rank. Every rank must call this."""


class SingleProcess:
    """One process, for tools and tests."""

    rank = 0
    world_size = 1

    def all_gather(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]


class ProcessGroupComm:
    """The ranks of a torch process group; give a gloo group, pickled objects travel on the CPU."""

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist  # late: the store itself needs no torch

        self._gather = dist.all_gather_object
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.world_size: int = dist.get_world_size(group)

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank. Every rank of the group must call this."""
        values: list[Any] = [None] * self.world_size
        self._gather(values, value, group=self._group)
        return values


def on_every_rank(comm: Comm, action: Callable[[], T]) -> list[T]:
    """Run ``action`` on every rank and gather the results, by rank. Every rank must call this.

    Raises:
        CheckpointError: on every rank alike, if the action failed on any; names the rank.
    """
    gathered = comm.all_gather(_attempt(action))
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(gathered) if text]
    if failures:
        raise CheckpointError("\n".join(failures))
    return [value for value, _ in gathered]


def on_rank_0(comm: Comm, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and give its result to all. Every rank must call this.

    Raises:
        CheckpointError: on every rank alike, if the action failed.
    """
    result, failure = comm.all_gather(_attempt(action) if comm.rank == 0 else None)[0]
    if failure:
        raise CheckpointError(failure)
    return cast(T, result)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """Its result, and why it failed, or nothing."""
    try:
        return action(), ""
    except (OSError, CheckpointError) as error:
        return None, str(error) or type(error).__name__

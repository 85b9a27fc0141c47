"""Which rank and microbatch computes which pack of a global batch: equal numbers, even costs.

Only the assignment depends on the layout. The set of packs in a global batch is the plan's alone.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

_GOOD_ENOUGH = 1.002
"""Cost of the dearest group, over the mean, at which nothing more is exchanged."""


def assign(costs: Sequence[float], *, dp_size: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Spread the packs of one global batch over ranks, and over the microbatches of each rank.

    Microbatches are ordered from dear to cheap on every rank, where costs/microbatch_order.py goes
    on for a pipeline.

    Args:
        costs: (global_batch_size,) of each pack, in any unit.
        dp_size: data-parallel ranks.
        micro_batch_size: packs per microbatch; dp_size * micro_batch_size divides the batch.

    Returns:
        assignment[dp_rank][microbatch] = positions in ``costs``; every position appears once.
    """
    assert len(costs) % (dp_size * micro_batch_size) == 0
    assignment = []
    for rank in split_evenly(costs, dp_size):
        rank_costs = [costs[pack] for pack in rank]
        groups = split_evenly(rank_costs, len(rank) // micro_batch_size)
        microbatches = [[rank[i] for i in group] for group in groups]
        microbatches.sort(key=lambda packs: -sum(costs[pack] for pack in packs))
        assignment.append(microbatches)
    return assignment


def split_evenly(costs: Sequence[float], num_groups: int) -> list[list[int]]:
    """Groups of equally many items and nearly equal cost.

    First the dearest item goes to the cheapest group that has room, and so on down; then the
    dearest group exchanges items with others, as long as that helps.

    Args:
        costs: (num_items,), num_items a multiple of num_groups.
        num_groups: how many groups.

    Returns:
        Positions in ``costs``, by group.
    """
    group_size = len(costs) // num_groups
    members: list[list[int]] = [[] for _ in range(num_groups)]
    cheapest = [(0.0, group) for group in range(num_groups)]
    heapify(cheapest)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        cost, group = heappop(cheapest)
        members[group].append(item)
        if len(members[group]) < group_size:
            heappush(cheapest, (cost + costs[item], group))
    groups = np.array(members, dtype=np.int64)
    if num_groups > 1 and group_size > 1:
        _exchange(groups, np.asarray(costs, dtype=np.float64))
    split: list[list[int]] = groups.tolist()
    return split


def _exchange(groups: NDArray[np.int64], costs: NDArray[np.float64]) -> None:
    """Swap items of the dearest group for cheaper ones, in place; (num_groups, group_size)."""
    totals = costs[groups].sum(axis=1)
    target = _GOOD_ENOUGH * totals.mean()
    for _ in range(8 * len(groups)):
        dearest = int(totals.argmax())
        if totals[dearest] <= target:
            return
        saved = costs[groups[dearest]][:, None, None] - costs[groups][None]
        outcome = np.maximum(totals[dearest] - saved, totals[None, :, None] + saved)
        outcome[:, dearest] = np.inf
        mine, other, theirs = np.unravel_index(outcome.argmin(), outcome.shape)
        if outcome[mine, other, theirs] >= totals[dearest]:
            return
        groups[dearest, mine], groups[other, theirs] = groups[other, theirs], groups[dearest, mine]
        totals[[dearest, other]] = costs[groups[[dearest, other]]].sum(axis=1)

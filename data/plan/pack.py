"""Samples of one window into packs: best fit, largest first, under two budgets at once.

A sample is as large as its share of the budget that it strains most. It goes where it leaves the
fewest tokens free; text goes first to packs that can take no more images.
"""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

_Room = list[tuple[int, int]]
"""(free tokens, pack) of packs where another sample may fit, sorted."""


def best_fit(
    num_tokens: NDArray[np.int64],
    num_patches: NDArray[np.int64],
    *,
    max_tokens: int,
    max_patches: int,
) -> list[list[int]]:
    """Group samples so that no group exceeds either budget.

    Args:
        num_tokens: (num_samples,) LLM tokens, each within max_tokens.
        num_patches: (num_samples,) ViT patches, each within max_patches.
        max_tokens: budget of a pack.
        max_patches: budget of a pack.

    Returns:
        Packs of positions into the arrays; every position is in exactly one.
    """
    strain = np.maximum(num_tokens * max_patches, num_patches * max_tokens)
    order = np.argsort(-strain, kind="stable")
    fewest_tokens = int(num_tokens.min(initial=max_tokens))
    fewest_patches = int(num_patches[num_patches > 0].min(initial=max_patches))

    packs: list[list[int]] = []
    free_patches: list[int] = []
    room: _Room = []
    room_for_text: _Room = []
    for position, tokens, patches in zip(
        order.tolist(), num_tokens[order].tolist(), num_patches[order].tolist(), strict=True
    ):
        found = None if patches else _take(room_for_text, free_patches, tokens, patches)
        found = found or _take(room, free_patches, tokens, patches)
        if found is None:
            found = (max_tokens, len(packs))
            packs.append([])
            free_patches.append(max_patches)
        free_tokens, pack = found[0] - tokens, found[1]
        packs[pack].append(position)
        free_patches[pack] -= patches
        if free_tokens >= fewest_tokens:
            open_to = room if free_patches[pack] >= fewest_patches else room_for_text
            insort(open_to, (free_tokens, pack))
    return packs


def _take(
    room: _Room, free_patches: list[int], tokens: int, patches: int
) -> tuple[int, int] | None:
    """Remove and return the fullest pack that takes the sample."""
    for place in range(bisect_left(room, (tokens, -1)), len(room)):
        if free_patches[room[place][1]] >= patches:
            return room.pop(place)
    return None

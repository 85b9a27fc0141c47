"""Samples of one window into packs, one pack after the other, under two budgets at once.

A pack begins with the sample that strains a budget most. Then it takes, of those that still fit,
the one after which both budgets are most nearly used up, and equally so: images where patches are
left, text where tokens are.

To find that sample in a few comparisons, samples lie on shelves: text on one, the others by their
patches per token, each shelf sorted by tokens. On a shelf the largest that fits is the best.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SHELVES = 4
"""Fewer fill less where both budgets bind; more cost time."""


@dataclass(slots=True)
class _Shelf:
    """Samples of about the same number of patches per token, from short to long."""

    tokens: list[int]
    patches: list[int]
    positions: list[int]
    least_ratio: float
    """Patches per token, of the sample that has fewest."""

    def take(self, place: int) -> int:
        """Remove a sample; returns its position in the window."""
        del self.tokens[place], self.patches[place]
        return self.positions.pop(place)


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
    shelves = _shelves(num_tokens, num_patches)
    packs: list[list[int]] = []
    while shelves:
        shelf = max(
            shelves,
            key=lambda shelf: max(shelf.tokens[-1] * max_patches, shelf.patches[-1] * max_tokens),
        )
        place, free_tokens, free_patches = len(shelf.tokens) - 1, max_tokens, max_patches
        pack: list[int] = []
        while place >= 0:
            free_tokens -= shelf.tokens[place]
            free_patches -= shelf.patches[place]
            pack.append(shelf.take(place))
            shelf, place = _next(shelves, free_tokens, free_patches, max_tokens, max_patches)
        packs.append(pack)
        shelves = [shelf for shelf in shelves if shelf.tokens]
    return packs


def _next(
    shelves: list[_Shelf], free_tokens: int, free_patches: int, max_tokens: int, max_patches: int
) -> tuple[_Shelf, int]:
    """Shelf and place of the sample that leaves least free, as shares of the budgets; -1 if none.

    Few and plain operations of IEEE 754, which are the same on every machine: all ranks must plan
    the same packs.
    """
    best, found, least_left = shelves[0], -1, float("inf")
    for shelf in shelves:
        tokens, patches = shelf.tokens, shelf.patches
        if not tokens or tokens[0] > free_tokens:
            continue
        longest = free_tokens
        if shelf.least_ratio * free_tokens > free_patches:
            longest = min(free_tokens, int(free_patches / shelf.least_ratio) + 1)
        place = bisect_right(tokens, longest) - 1
        while place >= 0 and patches[place] > free_patches:
            place -= 1
        if place >= 0:
            tokens_left = (free_tokens - tokens[place]) / max_tokens
            patches_left = (free_patches - patches[place]) / max_patches
            between = tokens_left - patches_left
            left = tokens_left * tokens_left + patches_left * patches_left + between * between
            if left < least_left:
                best, found, least_left = shelf, place, left
    return best, found


def _shelves(num_tokens: NDArray[np.int64], num_patches: NDArray[np.int64]) -> list[_Shelf]:
    """Text on the first, all others on equally many, by patches per token; no empty ones."""
    ratio = num_patches / num_tokens
    images = np.flatnonzero(num_patches)
    images = images[np.argsort(ratio[images], kind="stable")]
    groups = [np.flatnonzero(num_patches == 0), *np.array_split(images, IMAGE_SHELVES)]
    shelves = []
    for group in (group for group in groups if group.size):
        by_length = group[np.lexsort((num_patches[group], num_tokens[group]))]
        shelves.append(
            _Shelf(
                tokens=num_tokens[by_length].tolist(),
                patches=num_patches[by_length].tolist(),
                positions=by_length.tolist(),
                least_ratio=float(ratio[by_length].min()),
            )
        )
    return shelves

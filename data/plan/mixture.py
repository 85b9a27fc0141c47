"""Which source each sample of the stream comes from: exact shares at every prefix, no randomness.

Shares of samples: with k sources, one may come next once it is behind its share by 1 / (2k - 2) of
a sample; of those, the one that would be the first to fall behind by more than 1 - 1 / (2k - 2).
After any number of samples every source is then within 1 - 1 / (2k - 2) of its share: less than one
sample, and no rule does better. (Taking the source that is furthest behind exceeds one from about
five sources on.)

Shares of tokens: one may come next while it has no more than its share of all tokens so far; of
those, the one whose next sample its share would have paid for first. After any number of samples a
source is then above its share by less than its own longest sample, and below by no more than the
longest of any source.

Shares are integers over their sum, so nothing is ever rounded.

Sources: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980);
J. Bennett and H. Zhang, WF2Q: worst-case fair weighted fair queueing, INFOCOM 1996, of which a
sample is a packet, and the tokens so far are the time.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

_LONGEST_PERIOD = 1 << 14
"""Samples; what repeats itself within so many is drawn once and remembered."""


def integer_shares(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the ratio of the weights as written: [0.5, 0.3] -> [5, 3]."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    scaled = [int(weight * common) for weight in exact]
    divisor = math.gcd(*scaled)
    return [value // divisor for value in scaled]


def draw_sources(
    shares: Sequence[int], counts: Sequence[int], num_samples: int
) -> NDArray[np.int64]:
    """Sources of the next samples of the stream.

    Args:
        shares: of each source, positive; see ``integer_shares``.
        counts: samples drawn of each source so far. Nothing else is remembered.
        num_samples: how many to draw.

    Returns:
        (num_samples,) source numbers.
    """
    num_periods, place = divmod(sum(counts), sum(shares))
    if sum(shares) <= _LONGEST_PERIOD:
        period = _period(tuple(shares))
        before = np.bincount(period[:place], minlength=len(shares)).tolist()
        ours = zip(counts, shares, before, strict=True)
        if all(count == num_periods * share + more for count, share, more in ours):
            return period.take(np.arange(place, place + num_samples), mode="wrap")
    return _draw_one_by_one(shares, counts, num_samples)


@lru_cache(maxsize=64)
def _period(shares: tuple[int, ...]) -> NDArray[np.int64]:
    """(sum(shares),) sources of a whole period: after it each has exactly its share."""
    return _draw_one_by_one(shares, [0] * len(shares), sum(shares))


def _draw_one_by_one(
    shares: Sequence[int], counts: Sequence[int], num_samples: int
) -> NDArray[np.int64]:
    total = sum(shares)
    slack = max(2 * len(shares) - 2, 1)
    taken = list(counts)
    first = sum(taken)

    def release(source: int) -> tuple[int, int]:
        """The place from which on the source may come."""
        place = -(-(slack * taken[source] + 1) * total // (slack * shares[source])) - 1
        return place, source

    def deadline(source: int) -> tuple[int, int]:
        """The place by which the source must have come."""
        place = -(-(slack * taken[source] + slack - 1) * total // (slack * shares[source]))
        return place, source

    waiting = [release(source) for source in range(len(shares))]
    heapify(waiting)
    ready: list[tuple[int, int]] = []
    drawn = np.empty(num_samples, dtype=np.int64)
    for n in range(num_samples):
        while waiting and waiting[0][0] <= first + n:
            heappush(ready, deadline(heappop(waiting)[1]))
        source = heappop(ready)[1]
        drawn[n] = source
        taken[source] += 1
        heappush(waiting, release(source))
    return drawn


def draw_by_tokens(
    shares: Sequence[int],
    counts: Sequence[int],
    upcoming: Sequence[Iterator[int]],
    num_samples: int,
) -> NDArray[np.int64]:
    """Sources of the next samples of the stream, where shares are of tokens.

    Args:
        shares: of each source, positive; see ``integer_shares``.
        counts: tokens drawn of each source so far. Nothing else is remembered.
        upcoming: of each source, the tokens of its next samples; what ends is a source that ends.
        num_samples: how many to draw.

    Returns:
        (num_samples,) source numbers; fewer where a source ends, up to its last sample.
    """
    total_share, common = sum(shares), math.lcm(*shares)
    price = [common // share for share in shares]
    taken, total = list(counts), sum(counts)
    lengths = [next(source, 0) for source in upcoming]
    # By the tokens of all sources from which on one may come; and by those that have come, in one
    # unit for all, once its next sample is paid for.
    waiting = [(-(-taken[n] * total_share // share), n) for n, share in enumerate(shares)]
    ready: list[tuple[int, int]] = []
    heapify(waiting)
    drawn: list[int] = []
    while len(drawn) < num_samples and 0 not in lengths:
        while waiting and waiting[0][0] <= total:
            source = heappop(waiting)[1]
            heappush(ready, ((taken[source] + lengths[source]) * price[source], source))
        source = heappop(ready)[1]
        drawn.append(source)
        taken[source] += lengths[source]
        total += lengths[source]
        lengths[source] = next(upcoming[source], 0)
        heappush(waiting, (-(-taken[source] * total_share // shares[source]), source))
    return np.array(drawn, dtype=np.int64)

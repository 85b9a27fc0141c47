"""The endless stream of samples: of the source that the mixture names, the next of its shuffle.

A source that may be repeated only so often ends with the last of its samples that fits a pack. The
others go on from there in their proportions, as a mixture that begins; when all have ended, so does
the stream.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from triptych.configs.schema import WeighBy
from triptych.data.plan.mixture import draw_by_tokens, draw_sources, integer_shares
from triptych.data.plan.permute import derive_key, shuffled
from triptych.data.plan.plan_sources import PlanSource

_AHEAD = 256
"""Samples of a source whose tokens are looked up at a time, after as many as it gave the last time;
decides nothing but speed."""


class StreamPlace(NamedTuple):
    """A place between two samples; one number for each source."""

    drawn: tuple[int, ...]
    """Samples before it, the skipped ones included."""
    skipped: tuple[int, ...]
    """Those of them that were too long for a pack."""
    counted: tuple[int, ...]
    """What the shares are of, since a source last ended; empty for drawn - skipped."""


class Drawn(NamedTuple):
    """Some samples of the stream, (num_drawn,) int64 each."""

    source_of: NDArray[np.int64]
    index_of: NDArray[np.int64]
    """In the source."""
    num_tokens: NDArray[np.int64]
    num_patches: NDArray[np.int64]


class _Samples(NamedTuple):
    """The next samples of one source that fit into a pack."""

    columns: NDArray[np.int64]
    """(3, num_samples): index in the source, tokens, patches."""
    places: NDArray[np.int64]
    """In the source's shuffle."""
    are_last: bool
    """The source has no others."""


class Stream:
    """The samples of a mixture, from any place."""

    def __init__(
        self,
        sources: Sequence[PlanSource],
        fitting_shares: Sequence[float],
        *,
        seed: int,
        seq_len: int,
        max_patches: int,
        weigh_by: WeighBy,
    ) -> None:
        """Reads nothing.

        Args:
            sources: of the plan, in order.
            fitting_shares: of each, the share of its samples that fit into a pack.
            seed: decides the shuffles.
            seq_len: tokens in a pack, at most.
            max_patches: ViT patches in a pack, at most.
            weigh_by: what weights are shares of.
        """
        self._sources, self._fitting_shares, self._weigh_by = sources, fitting_shares, weigh_by
        self._seq_len, self._max_patches = seq_len, max_patches
        self._shares = integer_shares([source.weight for source in sources])
        self._keys = [derive_key(seed, "samples", source.name) for source in sources]
        self._ahead = [_AHEAD] * len(sources)

    def is_over(self, place: StreamPlace) -> bool:
        """Whether all sources have ended."""
        return not self._going_on(place)

    def draw(self, start: StreamPlace, num_samples: int) -> tuple[Drawn, StreamPlace]:
        """The next samples, fewer where the stream ends, and the place after them."""
        place, parts, missing = start, [np.empty((4, 0), dtype=np.int64)], num_samples
        while missing and not self.is_over(place):
            part, place = self._draw_until_one_ends(place, missing)
            parts.append(part)
            missing -= part.shape[1]
        return Drawn(*np.concatenate(parts, axis=1)), place

    def _going_on(self, place: StreamPlace) -> list[int]:
        return [
            number
            for number, (source, drawn) in enumerate(zip(self._sources, place.drawn, strict=True))
            if source.limit is None or drawn < source.limit
        ]

    def _draw_until_one_ends(
        self, place: StreamPlace, num_samples: int
    ) -> tuple[NDArray[np.int64], StreamPlace]:
        """At most so many samples, and none after the last one of a source; rows as ``Drawn``."""
        drawn, skipped = list(place.drawn), list(place.skipped)
        counted = list(place.counted or np.subtract(drawn, skipped).tolist())
        by_tokens = self._weigh_by is WeighBy.tokens
        draw = self._draw_by_tokens if by_tokens else self._draw_by_samples
        source_of, found = draw(place, counted, num_samples)
        part, has_ended = np.empty((4, len(source_of)), dtype=np.int64), False
        part[0] = source_of
        for number, samples in found.items():
            here = np.flatnonzero(source_of == number)
            taken, num_found = samples.columns[:, : len(here)], len(samples.places)
            part[1:, here] = taken
            end, limit = drawn[number], self._sources[number].limit
            if samples.are_last and len(here) == num_found and limit is not None:
                end, has_ended = limit, True
            elif len(here):
                end = int(samples.places[len(here) - 1]) + 1
            skipped[number] += end - drawn[number] - len(here)
            drawn[number] = end
            counted[number] += int(taken[1].sum()) if by_tokens else len(here)
        if has_ended:
            counted = [0] * len(counted)
        keeps = by_tokens or has_ended or place.counted
        after = StreamPlace(tuple(drawn), tuple(skipped), tuple(counted) if keeps else ())
        return part, after

    def _draw_by_samples(
        self, place: StreamPlace, counted: Sequence[int], num_samples: int
    ) -> tuple[NDArray[np.int64], dict[int, _Samples]]:
        """Source of each sample, and at least as many samples of each source."""
        numbers = self._going_on(place)
        shares, counts = ([values[n] for n in numbers] for values in (self._shares, counted))
        source_of = np.array(numbers)[draw_sources(shares, counts, num_samples)]
        end, found = num_samples, {}
        for number in numbers:
            here = np.flatnonzero(source_of == number)
            ends = self._sources[number].limit is not None
            samples = self._next(number, place.drawn[number], len(here) + ends)
            found[number] = samples
            if samples.are_last:
                last = here[: len(samples.places)]
                end = min(end, int(last[-1]) + 1 if len(last) else 0)
        return source_of[:end], found

    def _draw_by_tokens(
        self, place: StreamPlace, counted: Sequence[int], num_samples: int
    ) -> tuple[NDArray[np.int64], dict[int, _Samples]]:
        """Source of each sample, and at least as many samples of each source."""
        numbers = self._going_on(place)
        shares, counts = ([values[n] for n in numbers] for values in (self._shares, counted))
        blocks: dict[int, list[_Samples]] = {number: [] for number in numbers}
        upcoming = [
            chain.from_iterable(self._tokens(n, place.drawn[n], blocks[n])) for n in numbers
        ]
        source_of = np.array(numbers)[draw_by_tokens(shares, counts, upcoming, num_samples)]
        found = {}
        for number in numbers:
            columns, places, are_last = zip(*blocks[number], strict=True)
            found[number] = _Samples(
                np.concatenate(columns, axis=1), np.concatenate(places), are_last[-1]
            )
            self._ahead[number] = max(_AHEAD, int(np.count_nonzero(source_of == number)))
        return source_of, found

    def _tokens(self, number: int, place: int, into: list[_Samples]) -> Iterator[list[int]]:
        """Tokens of a source's next samples, which are kept block by block."""
        count = self._ahead[number]
        while not (into and into[-1].are_last):
            into.append(self._next(number, place, count))
            columns, places, _ = into[-1]
            yield columns[1].tolist()
            place = int(places[-1]) + 1 if len(places) else place
            count = _AHEAD

    def _next(self, number: int, place: int, count: int) -> _Samples:
        """The next samples of a source that fit, fewer where it ends."""
        source = self._sources[number]
        limit = math.inf if source.limit is None else source.limit
        source.sizes.check()
        kept = [np.empty((4, 0), dtype=np.int64)]
        missing = count
        while missing and place < limit:
            end = min(place + math.ceil(missing / self._fitting_shares[number]), limit)
            places = np.arange(place, end, dtype=np.int64)
            indices = shuffled(places, len(source), self._keys[number])
            num_tokens = source.sizes.num_tokens[indices]
            num_patches = source.sizes.num_patches[indices]
            fits = (num_tokens <= self._seq_len) & (num_patches <= self._max_patches)
            fitting = np.flatnonzero(fits)[:missing]
            kept.append(np.stack([indices, num_tokens, num_patches, places])[:, fitting])
            missing -= len(fitting)
            place = int(places[-1]) + 1
        found = np.concatenate(kept, axis=1)
        return _Samples(found[:3], found[3], are_last=missing > 0)

"""The order of training as a pure function of metadata; its state is a few numbers.

    stream   sample n is of the source that the mixture names, the next of that source's shuffle
    window   the next ``window`` samples of the stream, packed by themselves, the packs shuffled
    plan     the packs of one window after the other, without end unless all sources have one

Neither ranks nor microbatches appear here: any layout trains on the same packs in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import xxhash

from triptych.configs.schema import Oversize, WeighBy
from triptych.costs.flops import Workload
from triptych.data.plan.mixture import integer_shares
from triptych.data.plan.pack import best_fit
from triptych.data.plan.passes import Passes, Remember, compute_anew, pass_over
from triptych.data.plan.permute import derive_key, shuffled
from triptych.data.plan.plan_sources import (
    PlanSource,
    check_samples,
    check_weights,
    expected_tokens,
    fitting_share,
)
from triptych.data.plan.stream import Stream, StreamPlace
from triptych.data.types import Pack, SampleId
from triptych.errors import DataError

_VERSION = "plan-3"
"""Part of the hash; changes whenever the same metadata would give another order."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place between two packs: all that a resumed run needs to know about its data."""

    drawn: tuple[int, ...]
    """Samples of each source before the window, the skipped ones included."""
    skipped: tuple[int, ...]
    """Those of them that were too long for a pack."""
    window: int = 0
    """Windows before this one."""
    offset: int = 0
    """Packs of the window before this place."""
    num_packs: int = 0
    """Packs before this place, of all windows."""
    counted: tuple[int, ...] = ()
    """See ``StreamPlace``."""

    @property
    def stream_place(self) -> StreamPlace:
        """Where the window begins."""
        return StreamPlace(self.drawn, self.skipped, self.counted)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; ``counted`` where there is something to say."""
        return {key: value for key, value in asdict(self).items() if value != ()}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Cursor":
        """The cursor that ``to_json`` described."""
        of_sources: dict[str, Any] = {
            key: tuple(value) for key, value in state.items() if isinstance(value, list | tuple)
        }
        return cls(**{**state, **of_sources})


@dataclass(frozen=True, slots=True)
class _Window:
    """One window's packs; its end is the start of the next."""

    start: Cursor
    end: Cursor
    packs: list[Pack]

    def cursor(self, offset: int) -> Cursor:
        """The place before pack ``offset``."""
        if offset == len(self.packs):
            return self.end
        return replace(self.start, offset=offset, num_packs=self.start.num_packs + offset)


class Plan:
    """Packs in their order, from any place. Holds one window; metadata arrays are not copied."""

    def __init__(
        self,
        sources: Sequence[PlanSource],
        *,
        seed: int,
        seq_len: int,
        max_patches: int,
        window: int,
        oversize: Oversize,
        weigh_by: WeighBy = WeighBy.samples,
        remember: Remember = compute_anew,
    ) -> None:
        """Checks and hashes the metadata: a pass over every count, unless it is remembered.

        Args:
            sources: at least one, of distinct names; their order numbers them.
            seed: decides every shuffle.
            seq_len: tokens in a pack, at most.
            max_patches: ViT patches in a pack, at most.
            window: samples that are packed together.
            oversize: what becomes of a sample beyond seq_len or max_patches.
            weigh_by: what the sources' weights are shares of.
            remember: where results of that pass are kept.

        Raises:
            ConfigError: no source, one name twice, or a weight that is not positive.
            DataError: a source is empty, or none of its samples fits; a sample has no tokens, or is
                too long and not to be skipped.
        """
        check_weights(sources)
        self.sources = tuple(sources)
        self.seed, self.seq_len, self.max_patches, self.window = seed, seq_len, max_patches, window
        check_samples(sources)
        self.ends = all(source.limit is not None for source in sources)
        """Whether there is a last pack."""
        passes = self._passes(weigh_by, remember)
        self.hash = passes.hash
        """xxh3-128, in hex, of all that decides the order and the costs."""
        self.num_fitting = passes.num_fitting
        """Samples of each source that fit into a pack."""
        self.expected_tokens = sum(map(expected_tokens, self.sources, passes.num_tokens))
        """Of all packs, where there is a last one."""
        fitting_shares = [
            fitting_share(*found, seq_len=seq_len, max_patches=max_patches, oversize=oversize)
            for found in zip(self.sources, passes.num_fitting, passes.misfits, strict=True)
        ]
        self._stream = Stream(
            self.sources,
            fitting_shares,
            seed=seed,
            seq_len=seq_len,
            max_patches=max_patches,
            weigh_by=weigh_by,
        )
        self._cached: _Window | None = None

    @property
    def start(self) -> Cursor:
        """Before the first pack."""
        zeros = (0,) * len(self.sources)
        return Cursor(drawn=zeros, skipped=zeros)

    def next_packs(self, cursor: Cursor, num_packs: int) -> tuple[list[Pack], Cursor]:
        """The packs after a place, fewer where the plan ends, and the place after them.

        Raises:
            DataError: the cursor is not a place of this plan, or a file of counts was cut.
        """
        if len(cursor.drawn) != len(self.sources) or len(cursor.skipped) != len(self.sources):
            raise DataError(
                f"a data position of {len(cursor.drawn)} sources, but the plan has "
                f"{len(self.sources)}: {', '.join(source.name for source in self.sources)}"
            )
        packs: list[Pack] = []
        while len(packs) < num_packs and not self.is_over(cursor):
            window = self._window_at(cursor)
            taken = window.packs[cursor.offset : cursor.offset + num_packs - len(packs)]
            packs += taken
            cursor = window.cursor(cursor.offset + len(taken))
        return packs, cursor

    def is_over(self, cursor: Cursor) -> bool:
        """Whether no pack comes after a place."""
        return self.ends and cursor.offset == 0 and self._stream.is_over(cursor.stream_place)

    def first_packs(self, num_packs: int) -> list[Pack]:
        """The packs that a validation loss is computed on: always the same."""
        return self.next_packs(self.start, num_packs)[0]

    def workload(self, pack: Pack) -> Workload:
        """What the FLOPs of a pack follow from."""
        token_pairs = patch_pairs = 0
        for number, i in pack.samples:
            source = self.sources[number]
            source.sizes.check()
            token_pairs += source.sizes.num_tokens.item(i) ** 2
            patch_pairs += source.sizes.num_patch_pairs.item(i)
        return Workload(
            num_tokens=pack.num_tokens,
            token_pairs=token_pairs,
            num_patches=pack.num_patches,
            patch_pairs=patch_pairs,
        )

    def _window_at(self, cursor: Cursor) -> _Window:
        start = replace(cursor, offset=0, num_packs=cursor.num_packs - cursor.offset)
        if self._cached is None or self._cached.start != start:
            self._cached = self._build(start)
        if not 0 <= cursor.offset < max(1, len(self._cached.packs)):
            raise DataError(
                f"a data position before pack {cursor.offset} of window {cursor.window}, which has "
                f"{len(self._cached.packs)} packs: it belongs to another plan"
            )
        return self._cached

    def _build(self, start: Cursor) -> _Window:
        """Draw and pack the window that begins at ``start``."""
        drawn, after = self._stream.draw(start.stream_place, self.window)
        source_of, index_of, num_tokens, num_patches = drawn
        groups = best_fit(
            num_tokens, num_patches, max_tokens=self.seq_len, max_patches=self.max_patches
        )
        key = derive_key(self.seed, "packs", start.window)
        order = shuffled(np.arange(len(groups)), max(1, len(groups)), key).tolist()
        groups = [groups[group] for group in order]
        placed = np.fromiter(chain.from_iterable(groups), dtype=np.int64)
        bounds = np.cumsum([0, *map(len, groups)])
        ids = list(map(SampleId, source_of[placed].tolist(), index_of[placed].tolist()))
        packs = [
            Pack(number, tuple(ids[begin:end]), tokens, patches)
            for number, begin, end, tokens, patches in zip(
                range(start.num_packs, start.num_packs + len(groups)),
                bounds[:-1].tolist(),
                bounds[1:].tolist(),
                np.add.reduceat(num_tokens[placed], bounds[:-1]).tolist(),
                np.add.reduceat(num_patches[placed], bounds[:-1]).tolist(),
                strict=True,
            )
        ]
        end = Cursor(
            **after._asdict(),
            window=start.window + 1,
            num_packs=start.num_packs + len(packs),
        )
        return _Window(start, end, packs)

    def _passes(self, weigh_by: WeighBy, remember: Remember) -> Passes:
        budgets = (self.seq_len, self.max_patches, self.window)
        shares = integer_shares([source.weight for source in self.sources])
        head = repr((_VERSION, self.seed, *budgets, shares))
        if weigh_by is WeighBy.tokens:
            head += repr(weigh_by.name)
        if any(source.limit is not None for source in self.sources):
            head += repr([source.limit for source in self.sources])
        counts = [(s.name, len(s), s.sizes.summary.xxh3_128) for s in self.sources]
        return remember(
            xxhash.xxh3_128_hexdigest(repr((head, counts)).encode()),
            sum(map(len, self.sources)),
            lambda: pass_over(
                self.sources, head, seq_len=self.seq_len, max_patches=self.max_patches
            ),
        )

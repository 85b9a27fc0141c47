"""Weights by tokens, sources that end: shares at every prefix, and the stream from any place."""

import math
from collections import Counter
from itertools import cycle, pairwise, repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.configs.schema import Oversize, WeighBy
from triptych.data.dataset.sizes import sizes_of
from triptych.data.plan.mixture import draw_by_tokens, integer_shares
from triptych.data.plan.order import Cursor, Plan
from triptych.data.plan.plan_sources import PlanSource
from triptych.data.plan.stream import Stream, StreamPlace
from triptych.errors import DataError

SEQ_LEN, MAX_PATCHES = 100, 50
weights = st.decimals("0.001", "20", places=3).map(float)


def source(name, weight, num_tokens, num_patches=0, max_epochs=None):
    tokens = np.asarray(num_tokens, dtype=np.int64)
    patches = np.full_like(tokens, num_patches)
    return PlanSource(name, weight, sizes_of(tokens, patches, patches**2), max_epochs)


@st.composite
def mixtures(draw, *, may_end=True):
    """Sources of a few samples, some of which fit no pack."""
    return [
        source(
            f"s{number}",
            draw(weights),
            [1, *draw(st.lists(st.integers(1, SEQ_LEN + 20), max_size=12))],
            max_epochs=draw(st.none() | st.sampled_from([1.0, 1.5, 3.0])) if may_end else None,
        )
        for number in range(draw(st.integers(1, 6)))
    ]


def make_stream(sources, weigh_by):
    shares = [(s.sizes.num_tokens <= SEQ_LEN).mean() for s in sources]
    return Stream(
        sources, shares, seed=0, seq_len=SEQ_LEN, max_patches=MAX_PATCHES, weigh_by=weigh_by
    )


def beginning(sources):
    return StreamPlace((0,) * len(sources), (0,) * len(sources), ())


# -- shares of tokens


@settings(deadline=None)
@given(
    st.lists(st.tuples(weights, st.lists(st.integers(1, 5000), min_size=1)), min_size=1, max_size=9)
)
def test_tokens_keep_their_shares_at_every_prefix(given_sources):
    """Above its share by less than its own longest sample, below by no more than anyone's."""
    shares = integer_shares([weight for weight, _ in given_sources])
    lengths = [lengths for _, lengths in given_sources]
    drawn = draw_by_tokens(shares, [0] * len(shares), [cycle(each) for each in lengths], 200)
    upcoming, tokens = [cycle(each) for each in lengths], [0] * len(shares)
    longest = max(map(max, lengths))
    for number in drawn.tolist():
        tokens[number] += next(upcoming[number])
        for taken, share, own in zip(tokens, shares, lengths, strict=True):
            excess = taken * sum(shares) - sum(tokens) * share  # exact: in tokens * sum(shares)
            assert excess < max(own) * sum(shares) or len(shares) == 1
            assert -excess <= longest * sum(shares)


@settings(deadline=None)
@given(st.lists(weights, min_size=1, max_size=9))
def test_where_all_samples_are_alike_tokens_are_samples(given_weights):
    shares = integer_shares(given_weights)
    drawn = draw_by_tokens(shares, [0] * len(shares), [repeat(7)] * len(shares), 300)
    counts = np.cumsum(np.eye(len(shares), dtype=np.int64)[drawn], axis=0)
    fair = np.outer(np.arange(1, 301), shares) / sum(shares)
    assert np.abs(counts - fair).max() <= 1


def test_tokens_stay_exact_after_a_trillion_of_them():
    counts = [700_000_000_000, 200_000_000_000, 100_000_000_000]
    drawn = draw_by_tokens([7, 2, 1], counts, [repeat(10), repeat(100), repeat(1)], 10_000)
    tokens = np.bincount(drawn, weights=np.array([10, 100, 1])[drawn])
    assert np.abs(tokens - tokens.sum() * np.array([0.7, 0.2, 0.1])).max() <= 100


# -- the stream


@pytest.mark.parametrize("weigh_by", WeighBy)
@settings(deadline=None, max_examples=25)
@given(mixtures(), st.lists(st.integers(0, 30), max_size=6))
def test_the_stream_goes_on_from_any_place(weigh_by, sources, chunks):
    stream, whole = make_stream(sources, weigh_by), beginning(sources)
    drawn, end = stream.draw(whole, sum(chunks))
    place, parts = whole, []
    for chunk in chunks:
        part, place = make_stream(sources, weigh_by).draw(place, chunk)
        parts.append(part)
    assert place == end
    if parts:
        joined = np.concatenate(parts, axis=1)
        assert joined.tolist() == np.stack(drawn).tolist()


@pytest.mark.parametrize("weigh_by", WeighBy)
@settings(deadline=None, max_examples=40)
@given(mixtures())
def test_a_source_gives_all_it_may_and_the_others_keep_their_proportions(weigh_by, sources):
    """Sample by sample: nothing past a limit, every epoch whole, shares of those that go on."""
    (source_of, index_of, num_tokens, num_patches), end = make_stream(sources, weigh_by).draw(
        beginning(sources), 150
    )
    for sample in zip(source_of, index_of, num_tokens, num_patches, strict=True):
        sizes = sources[sample[0]].sizes
        assert sample[2:] == (sizes.num_tokens[sample[1]], sizes.num_patches[sample[1]])
    counts = Counter(zip(source_of.tolist(), index_of.tolist(), strict=True))
    last = {}
    for number, each in enumerate(sources):
        fits = np.flatnonzero(each.sizes.num_tokens <= SEQ_LEN)
        seen = [counts[number, i] for i in fits.tolist()]
        assert sum(seen) == end.drawn[number] - end.skipped[number]
        has_ended = each.limit is not None and end.drawn[number] == each.limit
        if has_ended:
            last[number] = int(np.flatnonzero(source_of == number)[-1]) if sum(seen) else -1
        if each.limit is None:
            assert max(seen) - min(seen) <= 1
        else:
            assert max(seen) <= math.ceil(each.max_epochs)
            assert min(seen) >= math.floor(each.max_epochs) * has_ended
    bound = SEQ_LEN if weigh_by is WeighBy.tokens else 1
    bounds = sorted({0, len(source_of), *(place + 1 for place in last.values())})
    for start, stop in pairwise(bounds):
        going_on = [n for n in range(len(sources)) if last.get(n, stop) >= start]
        shares = integer_shares([sources[n].weight for n in going_on])
        part = slice(start, stop)
        weigh = [
            int(sources[n].sizes.num_tokens[i]) if weigh_by is WeighBy.tokens else 1
            for n, i in zip(source_of[part].tolist(), index_of[part].tolist(), strict=True)
        ]
        taken = np.cumsum(
            np.equal.outer(source_of[part], going_on) * np.reshape(weigh, (-1, 1)), axis=0
        )
        fair = np.outer(taken.sum(axis=1), shares) / sum(shares)
        assert np.abs(taken - fair).max() <= bound


@pytest.mark.parametrize("weigh_by", WeighBy)
def test_what_comes_of_a_source_that_ends(weigh_by):
    """Three equal sources, one of 4 samples: three by turns, then two, then one, then nothing."""
    sources = [
        source("short", 1, [10] * 4, max_epochs=1),
        source("long", 1, [10] * 10, max_epochs=1),
        source("longer", 1, [10] * 10, max_epochs=1.5),
    ]
    stream = make_stream(sources, weigh_by)
    (source_of, *_), end = stream.draw(beginning(sources), 1000)
    assert len(source_of) == 4 + 10 + 15
    assert stream.is_over(end)
    last = [int(np.flatnonzero(source_of == number)[-1]) for number in range(3)]
    assert 9 <= last[0] <= 11
    assert 21 <= last[1] <= 24
    assert set(source_of[last[1] + 1 :].tolist()) == {2}


# -- the plan of sources that end


def make_plan(*sources, weigh_by=WeighBy.samples, window=16):
    return Plan(
        sources,
        seed=0,
        seq_len=SEQ_LEN,
        max_patches=MAX_PATCHES,
        window=window,
        oversize=Oversize.skip,
        weigh_by=weigh_by,
    )


@pytest.mark.parametrize("weigh_by", WeighBy)
def test_a_plan_ends_after_every_sample_that_may_come(weigh_by):
    sources = [
        source("a", 1, [10, 120, 30, 40], max_epochs=2),
        source("b", 3, range(5, 60), max_epochs=1),
    ]
    plan = make_plan(*sources, weigh_by=weigh_by)
    packs, cursor = [], plan.start
    while not plan.is_over(cursor):
        found, cursor = make_plan(*sources, weigh_by=weigh_by).next_packs(
            Cursor.from_json(cursor.to_json()), 3
        )
        packs += found
    assert plan.next_packs(plan.start, 1000)[0] == packs
    assert plan.next_packs(cursor, 1) == ([], cursor)
    counts = Counter(sample for pack in packs for sample in pack.samples)
    assert counts == {(0, 0): 2, (0, 2): 2, (0, 3): 2} | {(1, i): 1 for i in range(55)}
    assert cursor.skipped == (2, 0)


def test_a_source_whose_part_of_an_epoch_fits_no_pack_gives_nothing():
    plan = make_plan(source("a", 1, [120] * 99 + [10], max_epochs=0.01))
    if plan.next_packs(plan.start, 5)[0]:
        pytest.skip("the one that fits is the first of this shuffle")
    assert plan.next_packs(plan.start, 5)[0] == []


def test_a_limit_below_one_sample_is_refused():
    with pytest.raises(DataError, match=r"source 'a': max_epochs=0\.1 of 5 samples is none.*0\.2"):
        make_plan(source("a", 1, [10] * 5, max_epochs=0.1))


def test_the_hash_covers_limits_and_what_is_weighed_and_is_the_former_one_without():
    """Hashes of plans without either stand in test_order.py."""
    plain = {"name": "a", "weight": 0.75, "num_tokens": [10, 20, 30]}
    other = source("b", 0.25, [10, 20, 30])
    hashes = [
        make_plan(source(**plain), other).hash,
        make_plan(source(**plain, max_epochs=1), other).hash,
        make_plan(source(**plain, max_epochs=2), other).hash,
        make_plan(source(**plain), other, weigh_by=WeighBy.tokens).hash,
        make_plan(source(**plain, max_epochs=1), other, weigh_by=WeighBy.tokens).hash,
    ]
    assert len(set(hashes)) == len(hashes)
    assert Cursor((1, 2), (0, 0)).to_json().keys() == {
        "drawn",
        "skipped",
        "window",
        "offset",
        "num_packs",
    }

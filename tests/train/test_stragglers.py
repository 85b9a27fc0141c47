"""Who is called slow, on made-up times: exactly who is, and nobody where all are alike."""

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from triptych.train.watch.stragglers import (
    CHECKPOINT,
    COMPUTE,
    DATA,
    NETWORK,
    Alarms,
    Straggler,
    Times,
    stragglers,
)

STEP_S = 0.25
CAUSES = (COMPUTE, DATA, CHECKPOINT)
LAYOUTS = [(1, 1, 2), (1, 1, 8), (2, 1, 2), (1, 2, 2), (2, 2, 2), (4, 2, 1)]
"""tp, pp, dp; in each, every stage has several ranks."""
layouts = st.sampled_from(LAYOUTS)


def cluster(tp: int, pp: int, dp: int, *, scale: float = 1.0) -> list[Times]:
    """Ranks of equal speed, two a host; the stages have unequal loads, and wait unequally."""
    places = [(t, d, p) for p in range(pp) for d in range(dp) for t in range(tp)]
    sizes = {"tp": tp, "pp": pp, "dp": dp}

    def group(axis: str, place: tuple[int, int, int]) -> tuple[int, ...]:
        own = {"tp": 0, "dp": 1, "pp": 2}[axis]
        same = [
            all(a == b for i, (a, b) in enumerate(zip(place, other, strict=True)) if i != own)
            for other in places
        ]
        return tuple(rank for rank, is_same in enumerate(same) if is_same)

    return [
        Times(
            host=f"n{rank // 2}",
            pp_rank=place[2],
            step_s=scale * STEP_S,
            own_s={
                COMPUTE: scale * 0.15 * (1 + place[2]),
                DATA: scale * 0.01,
                CHECKPOINT: scale * 0.5,
            },
            waits_s={axis: scale * 0.02 * (1 + place[2]) for axis in sizes},
            groups={axis: group(axis, place) for axis, size in sizes.items() if size > 1},
        )
        for rank, place in enumerate(places)
    ]


def slowed(ranks: list[Times], rank: int, cause: str, seconds: float) -> list[Times]:
    """One rank takes longer; all others wait for it, in whatever group."""
    changed = []
    for number, times in enumerate(ranks):
        own, waits = dict(times.own_s), dict(times.waits_s)
        if number == rank:
            own[cause] += seconds
        else:
            waits = {axis: waited + seconds for axis, waited in waits.items()}
        changed.append(
            Times(times.host, times.pp_rank, times.step_s + seconds, own, waits, times.groups)
        )
    return changed


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fifty_milliseconds_of_one_rank_are_found_with_their_cause(layout, cause):
    for rank in range(len(cluster(*layout))):
        found = stragglers(slowed(cluster(*layout), rank, cause, 0.05))
        assert found == [Straggler(cause, (rank,))]
        assert found[0].extra_s == pytest.approx(0.05)


@given(layouts, st.floats(0.01, 100), st.data())
def test_nobody_is_slow_where_all_are_alike(layout, scale, data):
    """However slow, and with some percent of noise."""
    ranks = cluster(*layout, scale=scale)
    noise = st.floats(-0.015, 0.015)
    noisy = [
        Times(
            times.host,
            times.pp_rank,
            times.step_s,
            {cause: s * (1 + data.draw(noise)) for cause, s in times.own_s.items()},
            {axis: s * (1 + data.draw(noise)) for axis, s in times.waits_s.items()},
            times.groups,
        )
        for times in ranks
    ]
    assert stragglers(ranks) == stragglers(noisy) == []


@given(layouts, st.sampled_from(CAUSES), st.data())
def test_more_than_one_in_ten_of_a_step_is_slow(layout, cause, data):
    ranks = cluster(*layout)
    rank = data.draw(st.integers(0, len(ranks) - 1))
    seconds = data.draw(st.floats(0.0, 1.0))
    assume(abs(seconds - 0.1 * (STEP_S + seconds)) > 1e-6)
    found = stragglers(slowed(ranks, rank, cause, seconds))
    is_slow = seconds > 0.1 * (STEP_S + seconds)
    assert found == ([Straggler(cause, (rank,))] if is_slow else [])


def with_slow_link(ranks: list[Times], rank: int, seconds: float) -> list[Times]:
    """Messages of every group of ``rank`` take longer, for all their members."""
    slow = {times_group for times_group in ranks[rank].groups.values()}
    return [
        Times(
            times.host,
            times.pp_rank,
            times.step_s + seconds,
            times.own_s,
            {
                axis: waited + (seconds if times.groups.get(axis) in slow else 0.0)
                for axis, waited in times.waits_s.items()
            },
            times.groups,
        )
        for times in ranks
    ]


@pytest.mark.parametrize(("layout", "rank"), itertools.product([(2, 1, 2), (2, 2, 2)], range(4)))
def test_a_slow_link_is_where_slow_groups_meet(layout, rank):
    [found] = stragglers(with_slow_link(cluster(*layout), rank, 0.05))
    assert (found.cause, found.ranks) == (NETWORK, (rank,))


def test_a_stage_with_more_to_exchange_is_no_slow_link():
    """One dp group per stage has no peers; the pp pairs have, and one of two ends it is."""
    ranks = cluster(1, 2, 2)
    for number in (2, 3):
        times = ranks[number]
        waits = {**times.waits_s, "dp": 0.2}
        ranks[number] = Times(times.host, 1, times.step_s, times.own_s, waits, times.groups)
    assert stragglers(ranks) == []
    assert stragglers(with_slow_link(ranks, 3, 0.05)) == [Straggler(NETWORK, (1, 3), "pp")]


def test_a_link_in_one_axis_is_one_of_its_ends():
    ranks = cluster(2, 1, 4)
    for number in (2, 3):  # a tp pair
        times = ranks[number]
        waits = {**times.waits_s, "tp": times.waits_s["tp"] + 0.05}
        ranks[number] = Times(times.host, 0, times.step_s, times.own_s, waits, times.groups)
    assert stragglers(ranks) == [Straggler(NETWORK, (2, 3), "tp")]


def test_what_is_slow_once_is_no_straggler_and_what_stays_slow_is_told_once():
    one, other = Straggler(COMPUTE, (1,), extra_s=0.05), Straggler(DATA, (0,))
    alarms = Alarms()
    windows = [[one], [], [one], [one, other], [one], [], [one], [one]]
    told = [alarms.new(found) for found in windows]
    assert told == [[], [], [], [one], [], [], [], [one]]
    assert alarms.new([Straggler(COMPUTE, (1,), extra_s=0.07)]) == [], "as slow as before, about"

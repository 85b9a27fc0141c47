"""The simulated pipeline against theory, and what holds of any schedule."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.costs.pipeline_schedule import (
    Event,
    ideal_bubble,
    makespan_of_orders,
    pp_stage_passes,
    simulate,
)


def test_one_forward_one_backward_by_hand():
    """2 stages, 3 microbatches, backward twice as long: each stage's passes at their times."""
    timeline = simulate([[1, 1]], [[2, 2]], num_microbatches=3)
    told = defaultdict(list)
    for event in timeline.events:
        name = f"{'FB'[event.is_backward]}{event.microbatch}"
        told[event.stage].append((name, event.start_s, event.end_s))
    assert told[0] == [
        ("F0", 0, 1),
        ("F1", 1, 2),
        ("B0", 4, 6),
        ("F2", 6, 7),
        ("B1", 7, 9),
        ("B2", 10, 12),
    ]
    assert told[1] == [
        ("F0", 1, 2),
        ("B0", 2, 4),
        ("F1", 4, 5),
        ("B1", 5, 7),
        ("F2", 7, 8),
        ("B2", 8, 10),
    ]
    assert timeline.makespan_s == 12
    assert timeline.bubble == pytest.approx(1 / 4)


def test_interleaved_order_by_hand():
    """Stage 0 of 2, 2 chunks: (pp - 1) * 2 + pp forward passes first, by groups of pp."""
    passes = pp_stage_passes(0, pp=2, vpp=2, num_microbatches=4)
    names = [f"{'FB'[todo.is_backward]}{todo.chunk}{todo.microbatch}" for todo in passes]
    assert names == ("F00 F01 F10 F11 F02 B10 F03 B11 F12 B00 F13 B01 B12 B13 B02 B03".split())


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("num_microbatches", [1, 3, 8, 64])
@pytest.mark.parametrize("backward_s", [1.0, 2.0, 3.0])
def test_balanced_bubble_is_the_known_one(pp, num_microbatches, backward_s):
    timeline = simulate([[1.0] * pp], [[backward_s] * pp], num_microbatches=num_microbatches)
    ideal = ideal_bubble(pp=pp, num_microbatches=num_microbatches)
    assert ideal == (pp - 1) / (num_microbatches + pp - 1)
    assert timeline.bubble == pytest.approx(ideal, abs=1e-9)


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("vpp", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_chunks_divide_the_bubble(pp, vpp, groups):
    seconds = np.ones((vpp, pp))
    m = groups * pp
    timeline = simulate(seconds, 2 * seconds, num_microbatches=m)
    assert timeline.bubble == pytest.approx((pp - 1) / (vpp * m + pp - 1), abs=1e-9)
    assert timeline.bubble == pytest.approx(ideal_bubble(pp=pp, num_microbatches=m, vpp=vpp))


def test_the_slowest_stage_sets_the_pace():
    """The last one is busy all the time, but for the first way in and the last way out."""
    timeline = simulate([[1, 1, 1, 2]], [[2, 2, 2, 4]], num_microbatches=64)
    assert timeline.makespan_s == 64 * (2 + 4) + 3 * (1 + 2)


def test_a_slow_first_stage_uses_the_way_out_for_its_warm_up():
    """It idles until its first gradient is back, less the three forward passes in the meantime."""
    timeline = simulate([[2, 1, 1, 1]], [[4, 2, 2, 2]], num_microbatches=64)
    assert timeline.makespan_s == 64 * (2 + 4) + 3 * (1 + 2) - 3 * 2


def test_messages_add_to_the_way_through():
    free = simulate([[1.0] * 4], [[2.0] * 4], num_microbatches=1)
    slow = simulate([[1.0] * 4], [[2.0] * 4], num_microbatches=1, p2p_s=0.5)
    assert slow.makespan_s - free.makespan_s == pytest.approx(2 * 3 * 0.5)


def test_one_stage_sends_nothing():
    assert simulate([[1.0]], [[2.0]], num_microbatches=5, p2p_s=9.0).makespan_s == 15


@st.composite
def schedules(draw):
    pp, vpp = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    m = draw(st.integers(1, 9)) if vpp == 1 else pp * draw(st.integers(1, 3))
    seconds = st.floats(0.01, 10)
    shape = (vpp, pp, m)
    times = [
        np.array(draw(st.lists(seconds, min_size=vpp * pp * m, max_size=vpp * pp * m)))
        for _ in range(2)
    ]
    return times[0].reshape(shape), times[1].reshape(shape), draw(st.sampled_from([0.0, 0.3]))


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_any_schedule_is_a_schedule(schedule):
    """Every pass once, no two at a time on a stage, none before its input."""
    forward, backward, p2p_s = schedule
    vpp, pp, m = forward.shape
    timeline = simulate(forward, backward, num_microbatches=m, p2p_s=p2p_s)
    by_pass = {event[:4]: event for event in timeline.events}
    assert len(by_pass) == len(timeline.events) == 2 * pp * vpp * m
    for stage in range(pp):
        mine = [event for event in timeline.events if event.stage == stage]
        assert all(a.end_s <= b.start_s for a, b in pairwise(mine))
    chain = [(stage, chunk, False) for chunk in range(vpp) for stage in range(pp)]
    chain += [(stage, chunk, True) for stage, chunk, _ in reversed(chain)]
    for i in range(m):
        way: list[Event] = [by_pass[stage, chunk, i, back] for stage, chunk, back in chain]
        for before, after in pairwise(way):
            message = p2p_s if before.stage != after.stage else 0.0
            assert after.start_s >= before.end_s + message - 1e-9
    for event in timeline.events:
        times = backward if event.is_backward else forward
        taken = times[event.chunk, event.stage, event.microbatch]
        assert event.end_s - event.start_s == pytest.approx(taken)
    busy = forward.sum() + backward.sum()
    assert timeline.makespan_s >= (forward + backward).sum(axis=(0, 2)).max() - 1e-9
    assert timeline.bubble == pytest.approx(1 - busy / (pp * timeline.makespan_s))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_quick_makespan_of_an_order_is_the_simulated_one(pp, vpp, groups, random):
    m = groups * pp
    forward, backward = np.array([random.uniform(0.1, 2) for _ in range(2 * vpp * pp * m)]).reshape(
        2, vpp, pp, m
    )
    makespan = makespan_of_orders(forward, backward)
    for _ in range(3):
        order = random.sample(range(m), m)
        timeline = simulate(forward[:, :, order], backward[:, :, order], num_microbatches=m)
        assert makespan(order) == timeline.makespan_s

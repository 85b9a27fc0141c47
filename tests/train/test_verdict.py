"""Which rank hangs, from what is seen of all: silent ones, late ones, else none."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.train.watch.place import Phase, Whereabouts
from triptych.train.watch.verdict import Grant, Seen, describe, late_ranks

GRANT = Grant(slack_s=10, timeout_s=600, usual_step_s=2.0)
LIMIT_S = 3 * 2.0 + 10 / 2


def seen(rank: int, phase: Phase, step: int = 7, stayed_s: float = 0.0, **more) -> Seen:
    return Seen(
        rank=rank,
        host="here",
        process=100 + rank,
        place=Whereabouts(phase, step, more.pop("doing", "")),
        stayed_s=stayed_s,
        may_stay_s=GRANT.stay_s(phase),
        waits_for=more.pop("waits_for", ""),
        silent_s=more.pop("silent_s", 0.0),
    )


def late(*ranks: Seen) -> list[int]:
    return [one.rank for one in late_ranks(ranks, GRANT.silence_s)]


def test_limits_follow_the_learnt_step_and_leave_time_to_go():
    assert GRANT.stay_s(Phase.COMPUTE) == GRANT.silence_s == LIMIT_S
    assert GRANT.stay_s(Phase.COMPUTE) < 3 * 2.0 + 10
    unlearnt = replace(GRANT, usual_step_s=None)
    assert unlearnt.silence_s == 30, "well below a minute: a rank may be killed early in a start"
    assert unlearnt.stay_s(Phase.COMPUTE) == 540, "compiling takes its time"
    assert GRANT.stay_s(Phase.START) == math.inf


def test_a_silent_rank_is_late_whatever_it_was_doing():
    others = [seen(rank, Phase.COMPUTE, stayed_s=5, waits_for="allreduce (dp)") for rank in (0, 2)]
    for phase in (Phase.START, Phase.DATA, Phase.COMPUTE, Phase.HOOKS):
        assert late(*others, seen(1, phase, silent_s=LIMIT_S + 0.1)) == [1]
        assert late(*others, seen(1, phase, silent_s=LIMIT_S - 0.1)) == []
    assert late(*others, seen(1, Phase.LEFT, silent_s=1000)) == []


def test_a_loader_may_take_as_long_as_the_others_can_wait():
    """A storage that retries for five minutes ends no run; nobody else is blamed meanwhile."""
    waiting = [seen(rank, Phase.COMPUTE, stayed_s=300, waits_for="allreduce") for rank in (0, 1)]
    assert late(*waiting, seen(2, Phase.DATA, stayed_s=300)) == []
    assert late(*waiting, seen(2, Phase.DATA, stayed_s=541)) == [2]
    assert late(*waiting, seen(2, Phase.HOOKS, step=6, stayed_s=300, doing="Checkpointing")) == []


def test_of_ranks_that_compute_the_one_that_waits_for_nobody_is_late():
    there = [seen(rank, Phase.COMPUTE, stayed_s=12, waits_for="recv (pp)") for rank in (0, 1, 3)]
    assert late(*there, seen(2, Phase.COMPUTE, stayed_s=12)) == [2]
    assert late(*there) == [0, 1, 3]
    told = describe(late_ranks(there, 11), len(there), 2.0)
    assert told.startswith("all ranks wait for each other:\n")
    assert "rank 3 (host here, process 103) stays for 12 s in step 7, computing, in recv" in told


def test_a_rank_that_failed_is_late_and_one_that_finished_is_not():
    slow = seen(0, Phase.HOOKS, stayed_s=541, doing="WandbTracker")
    assert late(slow, seen(1, Phase.LEFT)) == [0]
    assert late(slow, seen(1, Phase.LEFT, doing="by an error")) == [1]


steps = st.integers(1, 3)
phases = st.sampled_from([Phase.DATA, Phase.COMPUTE, Phase.HOOKS])


@given(st.lists(st.tuples(steps, phases, st.floats(0, LIMIT_S)), min_size=1, max_size=8))
def test_nobody_is_late_while_all_are_within_their_limits(places):
    ranks = [seen(i, phase, step, stayed) for i, (step, phase, stayed) in enumerate(places)]
    assert late(*ranks) == []


@given(st.lists(st.tuples(steps, phases), min_size=2, max_size=8), st.data())
def test_only_the_furthest_behind_are_blamed(places, data):
    ranks = [seen(i, phase, step, stayed_s=601) for i, (step, phase) in enumerate(places)]
    last = min(places)
    assert set(late(*ranks)) == {i for i, place in enumerate(places) if place == last}


@pytest.mark.parametrize("usual", [None, 0.5])
def test_people_read_who_and_where(usual):
    told = describe([seen(3, Phase.HOOKS, silent_s=30, doing="Ledger")], 4, usual)
    assert told.startswith("rank 3 (host here, process 103) shows no sign of life for 30 s; ")
    assert "last seen: step 7, in Ledger after the step; " in told
    assert told.endswith("no step is done yet" if usual is None else "usually takes 0.5 s")

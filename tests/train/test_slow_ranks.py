"""A rank of a real run that sleeps in its own work is told as slow, with the cause."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from triptych.configs.schema import Config
from triptych.parallel.waits import measure_waits, take_waits, waits_for
from triptych.tests.helpers.clock import Clock
from triptych.tests.helpers.runs import train
from triptych.tests.helpers.slow_work import slow_work
from triptych.train.events import read_events

pytestmark = pytest.mark.distributed
SLEEPS_S = 0.5
"""Several times what a step takes: noise of a busy machine is no reason to tell another rank."""


CAUSES = [("compute", "dp2", 1), ("data", "dp2", 0), ("checkpoint", "dp2", 1)]


@pytest.mark.slow
@pytest.mark.idle  # of real time a very busy machine may give another rank more
@pytest.mark.parametrize(("cause", "layout", "rank"), [*CAUSES, ("compute", "tp2 pp2", 2)])
def test_the_right_rank_and_cause_are_told(cause, layout, rank, runs):
    told_of(cause, layout, rank, time, runs)


@pytest.mark.parametrize(("cause", "layout", "rank"), CAUSES[:1])
def test_the_right_rank_and_cause_are_told_by_a_clock_that_nothing_disturbs(
    cause, layout, rank, runs
):
    told_of(cause, layout, rank, Clock(), runs)


def told_of(cause, layout, rank, clock, runs):
    words = ("train.num_steps=7", "run.checkpoint_every=1", "data.prefetch_steps=0")
    slow = {"cause": cause, "slow_rank": rank, "clock": None if clock is time else clock}
    told, *_ = runs.call(train_slowly, "run", layout, *words, **slow)
    events = [event for event in read_events(runs.dir("run")) if event["what"] == "straggler"]
    found = {(event["cause"], *event["ranks"]): event for event in events}
    assert (cause, rank) in found, events
    event = found[cause, rank]
    assert event["step"] == 6, "the second window of three steps"
    assert event["extra_s"] > SLEEPS_S / 2
    assert len(event["hosts"]) == 1
    assert f"slow: {cause} of rank {rank} (host " in told


def train_slowly(config: Config, cause: str, slow_rank: int, clock: Clock | None) -> str:
    def sleep() -> None:
        (clock or time).sleep(SLEEPS_S if dist.get_rank() == slow_rank else SLEEPS_S / 10)

    with (
        slow_work(cause, sleep),
        mock.patch("triptych.train.hooks.slow_ranks.WINDOW_STEPS", 3),
        mock.patch("triptych.train.watch.place.time", clock or time),
        mock.patch("triptych.parallel.waits.time", clock or time),
    ):
        return train(config)


def test_waits_are_told_apart_by_group(pool, tmp_path):
    """The one that comes late waits for nobody, as far as it is known: it may be kept waiting."""
    for rank, (waited, before, after) in enumerate(pool(2).run(wait_in_turn, folder=tmp_path)):
        assert before == after == ""
        late = {"dp": 1, "own": 0}
        for group, late_rank in late.items():
            if rank != late_rank:
                assert waited[group] >= SLEEPS_S


def wait_in_turn(folder):
    other = dist.new_group([0, 1], group_desc="own")
    measure_waits({})
    take_waits()
    world = dist.group.WORLD
    with mock.patch("triptych.parallel.waits._waits.names", {}):
        before = waits_for()
        dist.barrier(world)
        take_waits()
        with come_late(1, folder / "dp"):
            dist.all_reduce(torch.ones(3), group=world)
        begin = partial(dist.all_reduce, torch.ones(3), group=other, async_op=True)
        begun = begin() if dist.get_rank() != 0 else None
        with come_late(0, folder / "own"):
            (begun or begin()).wait()
    by_group_s = take_waits().by_group_s
    return {"dp": by_group_s["default_pg"], "own": by_group_s["own"]}, before, waits_for()


@contextmanager
def come_late(rank: int, other_waits: Path) -> Iterator[None]:
    """``rank`` begins ``SLEEPS_S`` after the other one was seen to wait, however busy both are."""
    if dist.get_rank() == rank:
        while not other_waits.exists():
            time.sleep(0.01)
        time.sleep(SLEEPS_S)
        yield
        return
    watcher = threading.Thread(target=touch_once_it_waits, args=(other_waits,))
    watcher.start()
    yield
    watcher.join()


def touch_once_it_waits(path: Path) -> None:
    while not waits_for():
        time.sleep(0.01)
    path.touch()


def test_a_wait_that_ends_while_the_watchdog_asks_for_it_is_told_or_not():
    """The watchdog's thread would end by an error, and its rank be taken for dead."""
    waits = mock.Mock()
    type(waits).now = mock.PropertyMock(side_effect=[("allreduce", "dp"), None])
    with mock.patch("triptych.parallel.waits._waits", waits):
        assert waits_for() == "allreduce (dp)"

"""A rank of a real run that sleeps in its own work is told as slow, with the cause."""

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from triptych.configs.schema import Config
from triptych.parallel.waits import measure_waits, take_waits, waits_for
from triptych.tests.helpers.runs import Runs, train
from triptych.train.events import read_events

pytestmark = pytest.mark.distributed
SLEEPS_S = 0.5
"""Several times what a step takes: noise of a busy machine is no reason to tell another rank."""


@pytest.fixture
def runs(pool, digits, tmp_path) -> Runs:
    return Runs(pool, digits, tmp_path)


@pytest.mark.parametrize(
    ("cause", "layout", "rank"),
    [
        ("compute", "dp2", 1),
        pytest.param("data", "dp2", 0, marks=pytest.mark.slow),
        pytest.param("checkpoint", "dp2", 1, marks=pytest.mark.slow),
        pytest.param("compute", "tp2 pp2", 2, marks=pytest.mark.slow),
    ],
)
def test_the_right_rank_and_cause_are_told(cause, layout, rank, runs):
    words = ("train.num_steps=7", "run.checkpoint_every=1", "data.prefetch_steps=0")
    told, *_ = runs.call(train_slowly, "run", layout, *words, cause=cause, slow_rank=rank)
    events = [event for event in read_events(runs.dir("run")) if event["what"] == "straggler"]
    found = {(event["cause"], *event["ranks"]): event for event in events}
    assert (cause, rank) in found, events
    event = found[cause, rank]
    assert event["step"] == 6, "the second window of three steps"
    assert event["extra_s"] > SLEEPS_S / 2
    assert len(event["hosts"]) == 1
    assert f"slow: {cause} of rank {rank} (host " in told


def train_slowly(config: Config, cause: str, slow_rank: int) -> str:
    from triptych.checkpoints.background_save import BackgroundSave
    from triptych.data.loading.loader import Loader
    from triptych.parallel.zero.megatron import MegatronZero

    owner, name = {
        "compute": (MegatronZero, "zero_grad"),
        "data": (Loader, "__next__"),
        "checkpoint": (BackgroundSave, "begin"),
    }[cause]
    original = getattr(owner, name)

    def slowly(*args, **options):
        time.sleep(SLEEPS_S if dist.get_rank() == slow_rank else 0.0)
        return original(*args, **options)

    with (
        mock.patch.object(owner, name, slowly),
        mock.patch("triptych.train.hooks.slow_ranks.WINDOW_STEPS", 3),
    ):
        return train(config)


def test_waits_are_told_apart_by_group(pool):
    """The one that comes late waits for nobody."""
    for rank, (waited, before, after) in enumerate(pool(2).run(wait_in_turn)):
        assert before == after == ""
        late = {"dp": 1, "own": 0}
        for group, late_rank in late.items():
            if rank != late_rank:
                assert waited[group] >= SLEEPS_S / 2


def wait_in_turn():
    other = dist.new_group([0, 1], group_desc="own")
    measure_waits({})
    take_waits()
    world = dist.group.WORLD
    with mock.patch("triptych.parallel.waits._waits.names", {}):
        before = waits_for()
        dist.barrier(world)
        take_waits()
        time.sleep(SLEEPS_S if dist.get_rank() == 1 else 0.0)
        dist.all_reduce(torch.ones(3), group=world)
        time.sleep(SLEEPS_S if dist.get_rank() == 0 else 0.0)
        work = dist.all_reduce(torch.ones(3), group=other, async_op=True)
        work.wait()
    by_group_s = take_waits().by_group_s
    return {"dp": by_group_s["default_pg"], "own": by_group_s["own"]}, before, waits_for()


def test_a_wait_that_ends_while_the_watchdog_asks_for_it_is_told_or_not():
    """The watchdog's thread would end by an error, and its rank be taken for dead."""
    waits = mock.Mock()
    type(waits).now = mock.PropertyMock(side_effect=[("allreduce", "dp"), None])
    with mock.patch("triptych.parallel.waits._waits", waits):
        assert waits_for() == "allreduce (dp)"

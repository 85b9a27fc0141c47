"""50 ms in a step of a real run are told, by the real clock and windows, of one rank alone."""

import itertools
import time

import pytest
import torch.distributed as dist

from triptych.configs.schema import Config
from triptych.tests.helpers.runs import train
from triptych.tests.helpers.slow_work import slow_work
from triptych.train.events import read_events
from triptych.train.hooks.slow_ranks import WINDOW_STEPS

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.idle]
SLOWER_S = 0.05
BLIP_S = 0.5
WORDS = (
    f"train.num_steps={2 * WINDOW_STEPS + 1}",
    "run.checkpoint_every=10",
    "run.keep=1",
    "data.prefetch_steps=0",
)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("cause", ["compute", "data", "checkpoint"])
def test_50_ms_of_one_rank_are_told_with_their_cause(cause, rank, runs):
    told = told_of(runs, cause, {rank: SLOWER_S})
    assert [(event["cause"], event["ranks"]) for event in told] == [(cause, [rank])], told
    assert told[0]["extra_s"] == pytest.approx(SLOWER_S, rel=0.4), told
    assert told[0]["step_s"] < 10 * SLOWER_S, "no tenth of a step: not to be told"


@pytest.mark.parametrize("cause", ["compute", "data", "checkpoint"])
def test_50_ms_of_every_rank_are_not_told(cause, runs):
    assert not told_of(runs, cause, {0: SLOWER_S, 1: SLOWER_S})


@pytest.mark.parametrize("rank", [0, 1])
def test_a_single_blip_in_each_window_is_not_told(rank, runs):
    assert not told_of(runs, "compute", {rank: BLIP_S}, every=WINDOW_STEPS)


def told_of(runs, cause: str, sleeps_s: dict[int, float], every: int = 1) -> list:
    runs.call(train_slowly, "run", "dp2", *WORDS, cause=cause, sleeps_s=sleeps_s, every=every)
    return [event for event in read_events(runs.dir("run")) if event["what"] == "straggler"]


def train_slowly(config: Config, cause: str, sleeps_s: dict[int, float], every: int) -> None:
    """The ranks of ``sleeps_s`` sleep before each ``every``-th piece of work of that kind."""
    calls = itertools.count(1)

    def sleep() -> None:
        if next(calls) % every == 0:
            time.sleep(sleeps_s.get(dist.get_rank(), 0.0))

    with slow_work(cause, sleep):
        train(config)

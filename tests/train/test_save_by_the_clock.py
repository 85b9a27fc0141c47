"""``run.save_every_minutes``: rank 0's clock decides, all ranks save after the same step."""

import itertools
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from triptych.configs.schema import Config
from triptych.tests.helpers.runs import Runs, checkpoint_names, losses, train

pytestmark = pytest.mark.distributed
WORDS = ("run.save_every_minutes=2", "run.keep=9", "train.num_steps=6")


def train_by_a_clock(config: Config, step_s: float) -> str:
    """Train where rank 0's clocks are its own: each look at one takes ``step_s``.

    The time of day goes back by as much. The other ranks' clocks stand still.
    """
    is_main = dist.get_rank() == 0
    looks, days = itertools.count(), itertools.count()
    clocks = SimpleNamespace(
        monotonic=lambda: 1e6 + next(looks) * step_s * is_main,
        time=lambda: 1e9 - next(days) * step_s,
        perf_counter=time.perf_counter,
    )
    with (
        mock.patch("triptych.train.hooks.checkpoint.time", clocks),
        mock.patch("triptych.train.events.time", clocks),
    ):
        return train(config)


@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2 pp2", marks=pytest.mark.slow)])
def test_all_ranks_save_when_it_is_time_for_one(layout, pool, digits, tmp_path):
    """A look a step, and one as a save begins: 45 s each are 2 minutes after 3 looks."""
    runs = Runs(pool, digits, tmp_path)
    told, *others = runs.call(train_by_a_clock, "run", layout, *WORDS, step_s=45.0)
    assert not any(others)
    assert told.count("checkpoint: ") == 2
    names = ["step_000000003.0", "step_000000006.0"]
    assert checkpoint_names(runs.dir("run")) == names
    again = runs.call(train_by_a_clock, "run", layout, *WORDS, "train.num_steps=7", step_s=0.0)[0]
    assert "step_000000006.0, step 6" in again, "the newest, whatever the time of day was"
    assert len(losses(runs.dir("run"))) == 7

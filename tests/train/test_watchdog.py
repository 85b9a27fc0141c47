"""A rank of a real run that hangs is named, the stacks of all are there, and all leave."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import chain, repeat
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.pool import RankFailureError
from triptych.tests.helpers.runs import LAYOUTS, train
from triptych.train.events import read_events
from triptych.train.watch.place import Phase, Whereabouts
from triptych.train.watch.watchdog import Watchdog, watching

slow = pytest.mark.slow
PLACES = {
    "data": "triptych.data.loading.loader.Loader.__next__",
    "compute": "triptych.train.step.microbatch_losses",
    "save": "triptych.checkpoints.background_save.BackgroundSave.begin",
}
"""What is called once a step there."""
HANGS_AFTER_S = {"stopped": 5, "asleep": 30, "killed": 30}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("place", "step", "how", "layout", "rank"),
    [
        ("compute", 2, "stopped", "dp2", 1),
        pytest.param("data", 2, "stopped", "dp2", 0, marks=slow),
        pytest.param("save", 1, "stopped", "dp2", 1, marks=slow),
        pytest.param("save", 1, "stopped", "tp2 pp2", 2, marks=slow),
        pytest.param("compute", 4, "asleep", "tp2 pp2", 3, marks=slow),
        pytest.param("compute", 4, "killed", "dp2", 0, marks=slow),
    ],
)
def test_a_rank_that_hangs_is_named_and_all_leave(place, step, how, layout, rank, runs):
    """Stopped as by kill -STOP, rank 0 that judges too; or alive, and waiting for nobody.

    One that was killed is noticed by the collectives before, and not taken for a hang. Ranks stop
    before anybody has learnt how long a step takes: then nobody is late who is only slow.
    """
    words = ("train.num_steps=9", "run.checkpoint_every=1", f"cluster.hang_s={HANGS_AFTER_S[how]}")
    case = {"place": place, "step": step, "how": how, "rank": rank}
    with pytest.raises(RankFailureError) as failed:
        runs.call(train_and_hang, "run", layout, *words, **case, grace_s=HANG_S)
    hangs = [event for event in read_events(runs.dir("run")) if event["what"] == "hang"]
    if how == "killed":
        assert not hangs
        return
    num_ranks = LAYOUTS[layout][0]
    assert str(failed.value).count("died, exit code 1") == num_ranks
    assert [late["rank"] for late in hangs[0]["late"]] == [rank]
    assert hangs[0]["step"] in (step - 1, step)
    assert hangs[0]["late"][0]["process"] > 0
    stacks = Path(hangs[0]["stacks"])
    for each in range(num_ranks):
        text = (stacks / f"rank_{each:05d}.txt").read_text()
        assert text.startswith(f"rank {each}, host ")
        assert "train/loop.py" in text
    trace = pickle.loads((stacks / f"collectives_{num_ranks - 1}").read_bytes())
    assert any(entry["profiling_name"] == "gloo:all_reduce" for entry in trace["entries"])
    told = str(failed.value)
    assert f"TrainingError: the run hangs: rank {rank} (host " in told
    assert f"-> stacks of all ranks: {stacks}" in told


def train_and_hang(config: Config, place: str, step: int, how: str, rank: int) -> None:
    """Train; one rank hangs in a step."""
    from importlib import import_module

    module, _, name = PLACES[place].rpartition(".")
    try:
        owner = import_module(module)
    except ModuleNotFoundError:
        module, _, kind = module.rpartition(".")
        owner = getattr(import_module(module), kind)
    original, calls = getattr(owner, name), iter(range(1, 100))

    def hang_once(*args, **options):
        if next(calls) == step and dist.get_rank() == rank:
            hang(how)
        return original(*args, **options)

    with mock.patch.object(owner, name, hang_once):
        train(config)


def hang(how: str) -> None:
    if how == "asleep":
        time.sleep(10_000)
    os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)


def test_a_rank_that_moves_on_while_it_tells_has_not_stayed_where_it_is_now(tmp_path):
    """Minutes of a save would be told as minutes of computing, and end the run."""
    config = load_config([f"run.dir={tmp_path}"])
    saving, computing = Whereabouts(Phase.HOOKS, 3, "Checkpointing"), Whereabouts(Phase.COMPUTE, 4)
    store = dist.HashStore()
    for num_looks in range(1, 5):
        looks = chain([saving] * (1 + num_looks), repeat(computing))
        with (
            mock.patch("triptych.train.watch.watchdog.here", lambda looks=looks: next(looks)),
            mock.patch("triptych.train.watch.watchdog.faulthandler"),
        ):
            watchdog = Watchdog(config, store, rank=1, world_size=2)
            for _ in range(3):
                watchdog._poll()
                told = json.loads(store.get("watch/rank/1"))
                assert told["place"]["phase"] != Phase.COMPUTE or not told["stayed_s"]
                if told["place"]["phase"] == Phase.COMPUTE:
                    break


def test_a_rank_has_given_a_sign_before_it_goes_on(tmp_path):
    """One that hangs within its watchdog's first half second would never be missed."""
    config, store = load_config([f"run.dir={tmp_path}"]), dist.HashStore()
    with watching(config, store, rank=1, world_size=2):
        assert store.check(["watch/rank/1"])


DIES_EARLY = """
import os, signal, sys, time
import torch.distributed as dist
from triptych.configs.compose import load_config
from triptych.parallel.mesh import Meeting, init_distributed
from triptych.train.watch.watchdog import watching

rank, place, *words = sys.argv[1:]
meeting = Meeting(dist.FileStore(place, 2), int(rank), 2)
with watching(load_config(words), meeting.store, meeting.rank, meeting.world_size):
    if meeting.rank == 1:
        while not meeting.store.check(["watch/rank/1"]):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    init_distributed(600, meeting)  # waits for rank 1, for as long as collectives may
"""


@pytest.mark.slow
def test_a_rank_that_dies_early_in_a_start_does_not_keep_the_others_waiting(tmp_path):
    """Without a launcher that sees it, as where the rank is on another node."""
    words = ["stage=2", f"run.dir={tmp_path}", "cluster.hang_s=4"]
    command = [sys.executable, "-c", DIES_EARLY]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    _, told = ranks[0].communicate()
    ranks[1].communicate()
    assert [rank.returncode for rank in ranks] == [1, -signal.SIGKILL]
    assert "the run hangs: rank 1 (host " in told
    assert "shows no sign of life" in told
    assert "no step is done yet" in told

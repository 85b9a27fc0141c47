"""One rank is killed, or asked to stop, anywhere in a save: the newest committed one loads."""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from triptych.checkpoints.layout import parse_step, step_folders
from triptych.checkpoints.manifest import verify
from triptych.checkpoints.shard_file import Snapshot
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.schema import Config
from triptych.parallel.agree import SingleProcess
from triptych.tests.helpers.known_place import is_change
from triptych.tests.helpers.pool import RankFailureError
from triptych.tests.helpers.runs import LAYOUTS, Runs, losses, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORDS = ("run.checkpoint_every=2", "run.keep=1")


@pytest.mark.parametrize("layout", ["dp2", "tp2 pp2", "dp2 pp2 interleaved"])
def test_the_newest_that_was_committed_loads(layout, pool, digits, tmp_path):
    """SIGKILL before each change that each rank makes among the checkpoints, from step 4's on.

    Each point is a run of its own that goes on from the same checkpoint of step 3. Every fifth is
    resumed, and its losses are those of a run that nobody killed.
    """
    runs = Runs(pool, digits, tmp_path)
    runs.call(train, "base", layout, *WORDS, "train.num_steps=3")
    shutil.copytree(runs.dir("base"), runs.dir("whole"))
    runs.call(train, "whole", layout, *WORDS, "train.num_steps=7")
    points = [
        (rank, step, resumed)
        for rank in range(LAYOUTS[layout][0])
        for step, resumed in killed_everywhere(runs, layout, rank)
    ]
    print(f"{layout}: {len(points)} points, of rank 0 {sum(rank == 0 for rank, *_ in points)}")
    assert len(points) >= 20
    assert {step for _, step, _ in points} == {3, 4}
    assert sum(resumed for *_, resumed in points) >= 4


def killed_everywhere(runs: Runs, layout: str, rank: int):
    """The step of the checkpoint that is left, point by point; and whether it was resumed."""
    for count in itertools.count():
        name = f"rank_{rank}_{count}"
        shutil.copytree(runs.dir("base"), runs.dir(name))
        try:
            runs.call(
                train_and_kill, name, layout, *WORDS, "train.num_steps=7", rank=rank, count=count
            )
        except RankFailureError as error:
            told = str(error)
        else:
            return
        assert f"rank {rank} died, exit code -9" in told
        root = runs.dir(name) / "checkpoints"
        found = CheckpointStore(root, SingleProcess()).newest()
        assert found is not None
        assert not verify(found, SingleProcess())
        left = sorted(path.name for path in root.iterdir() if path.is_dir())
        assert not [folder for folder in left if folder.count(".") > 1], "leftovers"
        step = json.loads((found / "data.json").read_text())["train"]["step"]
        if count % 5 == 0:  # it retires what was found
            runs.call(train, name, layout, *WORDS, "train.num_steps=7")
            assert losses(runs.dir(name)) == losses(runs.dir("whole"))
        yield step, count % 5 == 0
        shutil.rmtree(runs.dir(name))


def train_and_kill(config: Config, rank: int, count: int) -> None:
    """Train; one rank dies at its ``count``-th change among the checkpoints, of whichever thread.

    Only up to step 6: what comes then is another save.
    """
    left, root, armed = [count], str(Path(config.run.dir) / "checkpoints"), [True]

    def kill(event: str, args: tuple[Any, ...]) -> None:
        if not (armed[0] and is_change(event, args)):
            return
        is_within = isinstance(args[0], str | Path) and str(args[0]).startswith(root)
        if "step_000000006" in str(args[0]):
            armed[0] = False
        elif is_within or event in ("os.remove", "os.rmdir"):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    if dist.get_rank() == rank:
        sys.addaudithook(kill)
    try:
        train(config)
    finally:
        armed[0] = False


def test_asked_to_stop_while_it_saves_a_run_commits_both(pool, digits, tmp_path):
    """TERM reaches rank 1's training thread while its other one writes step 2."""
    runs = Runs(pool, digits, tmp_path)
    runs.call(train, "whole", "dp2", "train.num_steps=6")
    told, _ = runs.call(train_and_ask, "run", "dp2", *WORDS, "run.keep=9", "train.num_steps=6")
    stopped = json.loads((runs.dir("run") / "stopped.json").read_text())
    assert 2 < stopped["step"] < 6
    assert "asked by rank 1: SIGTERM" in told
    root = runs.dir("run") / "checkpoints"
    saved = [parse_step(folder.name).step for folder in step_folders(root)]
    assert saved[0] == stopped["step"]
    assert 2 in saved
    assert not [folder for folder in step_folders(root) if verify(folder, SingleProcess())]
    runs.call(train, "run", "dp2", *WORDS, "train.num_steps=6")
    assert losses(runs.dir("run")) == losses(runs.dir("whole"))


def train_and_ask(config: Config) -> str:
    """Train; rank 1 is asked to stop by a TERM in the middle of its first save."""
    write, asked = Snapshot.write, []

    def ask(self, *arguments):
        if dist.get_rank() == 1 and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, *arguments)

    with mock.patch.object(Snapshot, "write", ask):
        return train(config)

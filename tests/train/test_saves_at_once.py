"""A save is asked for while the one before is in flight, and by several at once."""

import threading
from unittest import mock

import pytest
import torch.distributed as dist

from triptych.checkpoints.background_save import BackgroundSave
from triptych.checkpoints.layout import parse_step, step_folders
from triptych.checkpoints.manifest import verify
from triptych.checkpoints.shard_file import Snapshot
from triptych.configs.schema import Config
from triptych.parallel.agree import SingleProcess
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.runs import Runs, losses, train
from triptych.train.events import read_events

pytestmark = pytest.mark.distributed


def test_each_waits_for_the_one_before_and_all_are_committed(pool, digits, tmp_path):
    """Steps, clock and the end of the run all ask after step 3: that is one save."""
    runs = Runs(pool, digits, tmp_path)
    words = ("train.num_steps=3", "run.checkpoint_every=1", "run.save_every_minutes=1e-9")
    runs.call(train_where_saves_meet, "run", "dp2", *words, "run.keep=9")
    saved = [event["step"] for event in read_events(runs.dir("run")) if event["what"] == "saved"]
    assert saved == [1, 2, 3]
    found = step_folders(runs.dir("run") / "checkpoints")
    assert [parse_step(folder.name).step for folder in found] == [3, 2, 1]
    assert not [folder for folder in found if verify(folder, SingleProcess())]
    runs.train("whole", "dp2", "train.num_steps=3")
    assert losses(runs.dir("run")) == losses(runs.dir("whole"))


def train_where_saves_meet(config: Config) -> None:
    """Rank 1 writes nothing of a save until the next one, or the end of the run, waits for it."""
    waited_for = threading.Event()
    write, poll = Snapshot.write, BackgroundSave.poll

    def write_late(self, *arguments):
        if dist.get_rank() == 1:
            assert waited_for.wait(HANG_S)
            waited_for.clear()
        return write(self, *arguments)

    def tell(self, *, wait=False, proven=False):
        if wait and self.step is not None:
            waited_for.set()
        return poll(self, wait=wait, proven=proven)

    with (
        mock.patch.object(Snapshot, "write", write_late),
        mock.patch.object(BackgroundSave, "poll", tell),
    ):
        train(config)

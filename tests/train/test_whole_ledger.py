"""No sample is lost or read twice over three stages that are killed and go on on other ranks."""

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from triptych.configs.compose import load_config
from triptych.tests.helpers.damage import flip_bits
from triptych.tests.helpers.pool import RankFailureError
from triptych.tests.helpers.runs import Runs, losses, train, train_and_die

NUM_STEPS = 9
OPTIONS = (
    f"train.num_steps={NUM_STEPS}",
    "train.global_batch_size=12",  # what 4, 2, 1 and 3 ranks divide
    "run.checkpoint_every=3",
    "data.max_unreadable=1.0",
    "data.max_unreadable_in_a_row=10000",
)
PROGRESS = "triptych.train.hooks.progress.Progress.after_step"
WRITE = "triptych.checkpoints.run_state.RunSnapshot.write"
RECORD = "triptych.checkpoints.checkpoint_writer.CheckpointWriter.record"
STARTS = {
    "1": [(4, 1, (PROGRESS, 5)), (2, 3, (WRITE, 1)), (1, 2, None)],
    "2": [(3, 2, (RECORD, 1)), (1, 4, (PROGRESS, 2)), (4, 1, None)],
    "3": [(2, 1, (PROGRESS, 8)), (3, 3, None)],
}
"""Stage -> its starts: dp, threads that read, and the call in which all ranks kill themselves."""
SOURCES = ("classification", "captions", "strings", "chat", "every_kind")


@pytest.mark.slow
@pytest.mark.distributed
def test_three_stages_with_five_kills_read_what_one_run_reads(pool, digits, tmp_path):
    """Packs of a mixture with videos, a seventh of whose media are damaged."""
    data = shutil.copytree(digits, tmp_path / "data")
    for name in SOURCES:
        flip_bits(data / name, every=7)
    runs = Runs(pool, data, tmp_path)

    def start(name, stage, dp, workers, kill=None):
        before = runs.dir(f"{name}{int(stage) - 1}")
        words = [f"data.num_workers={workers}", f"data.prefetch_steps={workers}"]
        words += [] if stage == "1" else [f"init.checkpoint={before}"]
        words = runs.words(f"{name}{stage}", "single", f"stage={stage}", *OPTIONS, *words)
        config = load_config(words)
        if kill is None:
            pool(dp).run(train, config=config)
            return
        target, call = kill
        with pytest.raises(RankFailureError, match="died, exit code -9"):
            pool(dp).run(train_and_die, config=config, target=target, call=call)

    lost, again, num_samples, num_unreadable = Counter(), Counter(), 0, 0
    for stage, starts in STARTS.items():
        start("whole", stage, 1, 2)
        for dp, workers, kill in starts:
            start("killed", stage, dp, workers, kill)
        whole, killed = runs.dir(f"whole{stage}"), runs.dir(f"killed{stage}")
        wanted, found = records(whole, "ledger"), records(killed, "ledger")
        assert list(wanted) == list(found) == list(range(1, NUM_STEPS + 1))
        for step, samples in wanted.items():
            lost += samples - found[step]
            again += found[step] - samples
            num_samples += samples.total()
        left_out = records(whole, "quarantine")
        assert records(killed, "quarantine") == left_out
        num_unreadable += sum(map(Counter.total, left_out.values()))
        assert losses(killed) == pytest.approx(losses(whole), rel=1e-5)
    print(
        f"{num_samples} samples, {num_unreadable} of them unreadable; "
        f"{lost.total()} lost, {again.total()} read twice"
    )
    assert num_unreadable > 20
    assert not lost
    assert not again


def records(run_dir: Path, folder: str) -> dict[int, Counter]:
    """Step -> samples, as (source, index), that the ledger or the quarantine has of it."""
    found: dict[int, Counter] = {}
    for file in (run_dir / folder).glob("dp_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert all(first["step"] <= second["step"] for first, second in pairwise(lines))
        for line in lines:
            samples = line.get("samples") or [(line["source"], line["index"])]
            found.setdefault(line["step"], Counter()).update(map(tuple, samples))
    return dict(sorted(found.items()))

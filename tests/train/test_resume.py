"""A run that is killed goes on as if nothing had happened; in any layout, on the same data."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import torch

from triptych.configs.schema import PARTS, Config
from triptych.launch.inspection.export_order import export
from triptych.tests.helpers.plain_shards import whole_tensors
from triptych.tests.helpers.processes import wait_until_dead
from triptych.tests.helpers.runs import (
    LAYOUTS,
    OVERLAP,
    Runs,
    checkpoint_names,
    losses,
    metrics,
    packs,
    refusal,
    train,
    without_times,
)
from triptych.train.events import read_events
from triptych.train.restarts import read_starts

pytestmark = pytest.mark.distributed

PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain.py"
PROGRESS = "triptych.train.hooks.progress.Progress.after_step"
WRITE = "triptych.checkpoints.run_state.RunSnapshot.write"
RECORD = "triptych.checkpoints.checkpoint_writer.CheckpointWriter.record"


WIDEST = "tp2 pp2"
SLOW_LAYOUTS = [
    pytest.param(name, marks=() if name == WIDEST else pytest.mark.slow) for name in LAYOUTS
]


@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_killed_run_goes_on_bit_for_bit(layout, runs):
    """Killed between two checkpoints, then while it saves, then when a save is all but done."""
    options = ("train.num_steps=10", "run.checkpoint_every=4")
    runs.train("whole", layout, *options)
    runs.kill("killed", layout, *options, target=PROGRESS, call=7)
    assert [line["step"] for line in metrics(runs.dir("killed"))] == [1, 2, 3, 4, 5, 6, 7]
    runs.kill("killed", layout, *options, target=WRITE, call=1)
    runs.kill("killed", layout, *options, target=RECORD, call=1)
    assert checkpoint_names(runs.dir("killed")) == ["step_000000004.0", "step_000000008.1.tmp"]
    told = runs.train("killed", layout, *options)
    assert "resumed from" in told
    assert "step_000000004.0, step 4" in told
    assert "restart 3: " in told
    starts = read_starts(read_events(runs.dir("killed")))
    assert [start.step for start in starts] == [0, 4, 4, 4]
    assert [start.end for start in starts] == ["died", "died", "died", "finished"]
    assert [start.reached for start in starts][::3] == [7, 10]

    assert without_times(runs.dir("killed")) == without_times(runs.dir("whole"))
    assert packs(runs.dir("killed")) == packs(runs.dir("whole"))
    names = ["step_000000004.0", "step_000000008.1", "step_000000010.1"]
    assert checkpoint_names(runs.dir("killed")) == names


@pytest.mark.torchrun
@pytest.mark.parametrize("moment", ["training", pytest.param("saving", marks=pytest.mark.slow)])
def test_killed_torchrun_goes_on_bit_for_bit(moment, runs):
    """Real processes; agent and ranks are killed from outside."""
    options = ["run.checkpoint_every=3"]
    folder = runs.dir("killed")
    signs = {"training": "ledger/dp_00000.jsonl", "saving": "checkpoints/step_000000006.0.tmp"}
    kill_torchrun(
        runs.words("killed", "pp2", *options, "train.num_steps=70"),
        when=lambda: (
            (folder / signs[moment]).exists() and (moment == "saving" or len(metrics(folder)) >= 4)
        ),
    )
    options += [f"train.num_steps={len(metrics(folder)) + 3}"]  # however late it was killed
    assert torchrun(runs.words("killed", "pp2", *options)).wait() == 0
    runs.train("whole", "pp2", *options)
    assert without_times(folder) == without_times(runs.dir("whole"))
    assert packs(folder) == packs(runs.dir("whole"))


def torchrun(words: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*command, PRETRAIN, *words], env=environment)


def kill_torchrun(words: list[str], when) -> None:
    agent = torchrun(words)
    while not when():
        assert agent.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    ranks = psutil.Process(agent.pid).children(recursive=True)
    for pid in (agent.pid, *(rank.pid for rank in ranks)):
        os.kill(pid, signal.SIGKILL)
    agent.wait()
    wait_until_dead(rank.pid for rank in ranks)


@pytest.fixture(scope="module")
def whole(pool, digits, tmp_path_factory) -> Path:
    """24 steps of one process, never stopped."""
    runs = Runs(pool, digits, tmp_path_factory.mktemp("whole"))
    runs.train("whole", "single", "train.num_steps=24")
    return runs.dir("whole")


def check_equal(run_dir: Path, whole: Path) -> None:
    """The same packs in every global batch; the 20 losses after step 4 within 1e-5."""
    assert packs(run_dir) == packs(whole)
    pairs = list(zip(losses(run_dir), losses(whole), strict=True))[4:]
    assert len(pairs) == 20
    worst = max(abs(got - want) / want for got, want in pairs)
    print(f"{run_dir.name}: losses of 20 steps within {worst:.1e}")
    assert worst <= 1e-5


def test_layout_may_change_at_every_resume(runs, whole):
    interleaved = "dp2 pp2 interleaved"
    for layout, last in {"dp2": 4, "tp2": 9, interleaved: 14, "pp2": 19, "single": 24}.items():
        overlap = OVERLAP if layout == interleaved else []
        runs.train("changing", layout, f"train.num_steps={last}", *overlap)
    check_equal(runs.dir("changing"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("then", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_any_layout_resumes_any_other(first, then, runs, whole):
    runs.train(f"{first} to {then}", first, "train.num_steps=4")
    runs.train(f"{first} to {then}", then, "train.num_steps=24")
    check_equal(runs.dir(f"{first} to {then}"), whole)


def test_a_finished_run_says_so_and_a_larger_cap_goes_on(runs):
    runs.train("run", "single", "train.num_steps=3")
    before = without_times(runs.dir("run"))
    told = runs.train("run", "single", "train.num_steps=3")
    assert "stage2 is finished: train.num_steps=3 reached" in told
    assert "a larger train.num_steps goes on from here" in told
    assert without_times(runs.dir("run")) == before
    runs.train("run", "single", "train.num_steps=5")
    assert len(losses(runs.dir("run"))) == 5


def test_the_token_budget_ends_the_stage(runs):
    budget = ("stage.token_budget=1200", "train.num_steps=null")
    told = runs.train("run", "single", *budget)
    lines = metrics(runs.dir("run"))
    assert lines[-2]["consumed_tokens"] < 1200 <= lines[-1]["consumed_tokens"]
    assert "its budget is used up" in told
    assert "its budget is used up" in runs.train("run", "single", *budget)


def test_resume_takes_a_path(runs):
    """Sent back to step 2, the run trains steps 3 to 6 again; what it saves then is the newest."""
    options = ("train.num_steps=6", "run.checkpoint_every=2")
    runs.train("run", "single", *options)
    first = without_times(runs.dir("run"))
    earlier = runs.dir("run") / "checkpoints" / "step_000000002.0"
    told = runs.train("run", "single", *options, "train.num_steps=4", f"resume={earlier}")
    assert f"resumed from {earlier}, step 2" in told
    assert without_times(runs.dir("run")) == first[:4]
    assert max(packs(runs.dir("run"))) == 4
    told = runs.train("run", "single", *options)
    assert "step_000000004.1, step 4" in told
    assert without_times(runs.dir("run")) == first


def test_resume_takes_the_path_of_another_run(runs):
    runs.train("run", "single", "train.num_steps=3")
    runs.train("other", "single", "train.num_steps=5", f"resume={runs.dir('run')}")
    runs.train("run", "single", "train.num_steps=5")
    assert without_times(runs.dir("other")) == without_times(runs.dir("run"))[3:]


def test_resume_never_refuses_to_pass_over_checkpoints(runs):
    runs.train("run", "single", "train.num_steps=1", "resume=never")
    config = (runs.dir("run") / "config.yaml").read_text()
    message = runs.refusal("run", "single", "train.num_steps=2", "resume=never")
    assert message.startswith("ConfigError: resume=never, but ")
    assert "has checkpoints  -> resume=auto, or another run.dir" in message
    assert (runs.dir("run") / "config.yaml").read_text() == config


def test_a_damaged_checkpoint_is_passed_over_on_all_ranks(runs):
    options = ("train.num_steps=6", "run.checkpoint_every=3")
    runs.train("run", "tp2", *options)
    whole = without_times(runs.dir("run"))
    shard = next((runs.dir("run") / "checkpoints" / "step_000000006.0" / "shards").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    told = runs.train("run", "tp2", *options)
    assert "step_000000006.0 is damaged, renamed step_000000006.0.damaged" in told
    assert shard.name in told
    assert "step_000000003.0, step 3" in told
    assert without_times(runs.dir("run")) == whole


def test_a_stage_ends_with_its_sources(runs):
    """Every pack there is but for an incomplete step; what resumes at the end has nothing to do."""
    limits = [f"data.sources.{name}.max_epochs=0.02" for name in ("strings", "captions", "text")]
    limits += ["data.sources.every_kind.max_epochs=1", "data.weigh_by=tokens"]
    refused = runs.refusal("run", "single", *limits, "train.num_steps=null")
    budget = re.search(
        r"stage.token_budget=40000 is more than the (\d+) tokens that data.order", refused
    )
    assert f"-> stage.token_budget={budget[1]}, or more data" in refused
    limits.append("train.num_steps=1000")
    runs.train("run", "dp2", *limits, "train.num_steps=3")
    told = runs.train("run", "single", *limits)
    assert "is finished: data.order, or every source's max_epochs, is used up" in told
    lines = metrics(runs.dir("run"))
    seen = sorted(number for step in packs(runs.dir("run")).values() for number in step)
    assert seen == list(range(4 * len(lines)))
    assert abs(lines[-1]["consumed_tokens"] - int(budget[1])) < 5 * 128
    newest = checkpoint_names(runs.dir("run"))[-1]
    assert newest == f"step_{len(lines):09}.0"
    assert "is finished: data.order, or every" in runs.train("run", "dp2", *limits)
    assert metrics(runs.dir("run")) == lines
    other = runs.refusal("run", "single", *limits, "data.sources.text.max_epochs=0.5")
    assert "because of\n  data.sources.text.max_epochs  0.02 -> 0.5\n" in other


@pytest.mark.slow
def test_a_run_takes_an_order(runs, capsys):
    """What export-order writes trains as the plan does, to its end; another one is refused."""
    order, taken = runs.dir("orders") / "order.npy", []
    order.parent.mkdir()
    words = runs.words("run", "single")
    export([*words, "--output", str(order), "--packs", "18"])
    assert f"{order}: 18 packs as rows of pack, source, index; sources: 0 strings, 1 captions" in (
        capsys.readouterr().out
    )
    for more in ([], [f"data.order={order}"]):
        runs.train(f"run{len(more)}", "dp2", *more, "train.num_steps=3")
        runs.train(
            f"run{len(more)}", "single", *more, "train.num_steps=99" if more else "resume=auto"
        )
        taken.append(losses(runs.dir(f"run{len(more)}"))[:4])
    assert taken[0] == taken[1]
    assert len(losses(runs.dir("run1"))) == 4
    np.save(order, np.load(order)[:-1])
    other = runs.refusal("run1", "single", f"data.order={order}", "train.num_steps=99")
    assert "a dataset of the mixture, or data.order, is other than it was  -> restore it" in other


def test_another_plan_is_refused_unless_accepted(runs):
    runs.train("run", "dp2", "train.num_steps=2")
    seen = metrics(runs.dir("run"))[-1]["consumed_samples"]
    other = ("train.num_steps=4", "data.mixtures.stage2.strings=0.9")
    messages, told = zip(*runs.call(refusal_and_told, "run", "dp2", *other), strict=True)
    assert len(set(messages)) == 1
    assert "was trained on the data plan" in messages[0]
    causes = "  data.mixtures.stage2.strings  0.5 -> 0.9\n  -> data.mixtures.stage2.strings=0.5, or"
    assert f", because of\n{causes} data.accept_new_plan=true" in messages[0]
    assert messages[0].endswith(f"the {seen} samples seen so far come again")
    assert len(told[0].splitlines()) == 1  # refused before the run introduces itself
    assert "reading the newest checkpoint" in told[0]
    accepted = runs.train("run", "dp2", *other, "data.accept_new_plan=true")
    assert "the data start anew, by plan" in accepted
    assert f"what was seen until here, {seen} samples of" in accepted
    newest = runs.dir("run") / "checkpoints" / "step_000000004.1" / "data.json"
    segments = json.loads(newest.read_text())["train"]["segments"]
    assert [segment["step"] for segment in segments] == [0, 2]
    assert len({segment["plan"] for segment in segments}) == 2
    starts = [numbers[0] for numbers in packs(runs.dir("run")).values()]
    assert starts == [0, 4, 0, 4]
    assert len(losses(runs.dir("run"))) == 4


def refusal_and_told(config: Config) -> tuple[str, str]:
    """The error of a run that is refused, and what this rank had told until then."""
    with mock.patch("triptych.tests.helpers.runs.io.StringIO", return_value=io.StringIO()) as made:
        message = refusal(config)
    return message, made.return_value.getvalue()


def test_what_differs_from_the_checkpoint_is_told(runs):
    runs.train("run", "single", "train.num_steps=1")
    assert "other than" not in runs.train("run", "single", "train.num_steps=1")
    told = runs.train("run", "single", "train.num_steps=2", "stage.llm.lr=3e-4")
    assert "step 1; other than in its configuration:\n" in told
    lines = [" ".join(line.split()[2:]) for line in told.splitlines()]  # after the time
    start = next(i for i, line in enumerate(lines) if "other than in its" in line) + 1
    expected = ["stage.llm.lr 0.001 -> 0.0003", "train.num_steps 1 -> 2"]
    assert lines[start : start + 2] == expected


def test_another_stage_is_refused(runs):
    runs.train("run", "single", "stage=1", "train.num_steps=1")
    message = runs.refusal("run", "single", "stage=2", "train.num_steps=2")
    assert message.startswith("CheckpointError: ")
    assert "is of stage1, this run is stage2  -> init.checkpoint=" in message


def test_another_model_is_refused(runs):
    runs.train("run", "single", "train.num_steps=1")
    message = runs.refusal("run", "single", "model.language.num_layers=2", "train.num_steps=2")
    assert "model.language.num_layers=2, the checkpoint has 4" in message


def test_a_stage_takes_over_the_weights_of_the_one_before(runs):
    """All else starts afresh; its rates move no weight, so the first checkpoint has them."""
    hand_over(runs, "stage1", "single", "stage=1", steps=3)
    rates = [f"stage.{part}.{rate}=1e-60" for part in PARTS for rate in ("lr", "min_lr")]
    fresh = hand_over(runs, "fresh", "single", "stage=2", "init.checkpoint={stage1}", *rates)
    before = tensors(runs, "stage1", "step_000000003.0")
    after = tensors(runs, "fresh", "step_000000001.0")
    for name in (name for name in before if name.startswith("model.")):
        assert torch.equal(after[name], before[name]), name
    assert fresh["num_updates"] == {"adapter": 1, "llm": 1, "vit": 1}
    assert fresh["train"]["step"] == 1
    assert fresh["train"]["consumed_tokens"] == metrics(runs.dir("fresh"))[0]["num_tokens"]
    assert packs(runs.dir("fresh")) == {1: [0, 1, 2, 3]}


def test_a_stage_may_take_over_the_optimizer_state_of_what_goes_on_training(runs):
    """Adam's second moment is beta2 * before + ...: what stage 1 left shows in stage 2."""
    hand_over(runs, "stage1", "single", "stage=1", steps=3)
    hand_over(runs, "fresh", "single", "stage=2", "init.checkpoint={stage1}")
    carried = hand_over(
        runs,
        "carried",
        "single",
        "stage=2",
        "init.checkpoint={stage1}",
        "init.optimizer_state=true",
    )
    before = tensors(runs, "stage1", "step_000000003.0")
    without = tensors(runs, "fresh", "step_000000001.0")
    with_state = tensors(runs, "carried", "step_000000001.0")
    assert carried["num_updates"] == {"adapter": 4, "llm": 1, "vit": 4}
    moments = [name for name in without if name.startswith("exp_avg_sq.")]
    assert {name.split(".")[1] for name in moments} == {"vision", "merger", "language"}
    for name in moments:
        left = 0.95 * before[name] if name in before else torch.zeros(())
        assert (name in before) == (not name.startswith("exp_avg_sq.language."))
        torch.testing.assert_close(with_state[name] - without[name], left.expand_as(without[name]))


def hand_over(runs: Runs, name: str, layout: str, *more: str, steps: int = 1) -> dict:
    """Run it; returns the numbers of its last checkpoint."""
    more = tuple(word.format(stage1=runs.dir("stage1")) for word in more)
    runs.train(name, layout, *more, f"train.num_steps={steps}")
    newest = runs.dir(name) / "checkpoints" / f"step_{steps:09d}.0"
    return json.loads((newest / "data.json").read_text())


def tensors(runs: Runs, name: str, checkpoint: str) -> dict[str, torch.Tensor]:
    """Every stored tensor by key."""
    folder = runs.dir(name) / "checkpoints" / checkpoint / "shards"
    return whole_tensors(folder)


def test_an_initial_checkpoint_is_not_needed_to_resume(runs):
    hand_over(runs, "stage1", "single", "stage=1")
    first = runs.train(
        "run", "single", "train.num_steps=1", f"init.checkpoint={runs.dir('stage1')}"
    )
    assert "optimizer state fresh; schedule and data from the start" in first
    shutil.rmtree(runs.dir("stage1"))
    runs.train("run", "single", "train.num_steps=2", f"init.checkpoint={runs.dir('stage1')}")
    assert len(losses(runs.dir("run"))) == 2


def test_saving_leaves_no_process_behind(runs):
    left = runs.call(children_after, "run", "dp2", "train.num_steps=1")
    assert not [command for rank in left for command in rank if DECODER not in command]


DECODER = "triptych.data.media.video_file"
"""It stays for the next video, and ends with its rank."""


def children_after(config: Config) -> list[str]:
    train(config)
    return [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]

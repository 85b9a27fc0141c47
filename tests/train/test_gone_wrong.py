"""Runs whose numbers go wrong: told, recorded, skipped or gone back from, and always bounded."""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import signal
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from triptych.configs.schema import Config, SpikesConfig
from triptych.data.plan.order import Cursor
from triptych.launch.inspection.run_again import run_again
from triptych.tests.helpers.pool import RankFailureError
from triptych.tests.helpers.runs import (
    Runs,
    checkpoint_names,
    losses,
    metrics,
    packs,
    refusal,
    train,
    without_times,
)
from triptych.tests.helpers.whole_state import whole_state
from triptych.train import events
from triptych.train.console import console
from triptych.train.hooks.checkpoint import Checkpointing
from triptych.train.hooks.progress import Progress
from triptych.train.spikes import loss_limit
from triptych.train.start import load_start
from triptych.train.state import PassedOver, TrainState
from triptych.train.step import microbatch_losses

distributed, slow = pytest.mark.distributed, pytest.mark.slow
SPIKES = ("train.spikes.window=3", "train.spikes.sigmas=3")


@pytest.mark.parametrize(
    ("recent", "limit"),
    [
        ([1.0] * 3, math.inf),
        ([1.0] * 4, 1.0 + 5 * 0.01),  # the least spread
        ([1.0, 2.0, 3.0, 2.0], 2.0 + 5 * math.sqrt(0.5)),
    ],
)
def test_a_spike_is_so_many_deviations_above_the_mean(recent, limit):
    assert loss_limit(recent, SpikesConfig(window=4, sigmas=5.0)) == pytest.approx(limit)


def test_the_state_counts_what_was_skipped_and_remembers_the_last_losses():
    state = TrainState(9, 1, 1, Cursor((0,), (0,), num_packs=36), ())
    for loss, is_skipped in ((3.0, False), (None, True), (9.0, True), (None, False)):
        state = state.judged(loss, is_skipped=is_skipped, window=2)
    assert (state.num_skipped, state.skipped_in_a_row, state.recent_losses) == (2, 2, (3.0,))
    for loss in (2.0, 1.0):
        state = state.judged(loss, is_skipped=False, window=2)
    assert (state.num_skipped, state.skipped_in_a_row, state.recent_losses) == (2, 0, (2.0, 1.0))
    before = TrainState(4, 1, 1, Cursor((0,), (0,), num_packs=16), ())
    back = before.passing_over(state)
    assert (back.step, back.cursor, back.passed_over) == (4, state.cursor, (PassedOver(4, 16, 36),))
    assert TrainState.from_json(json.loads(json.dumps(back.to_json()))) == back


def spoil(
    config: Config, wrong: dict[str, float], *, only_at_first: bool = False, refused: bool = False
) -> tuple[str, list[str]]:
    """Train where some microbatches, named by their first sample, tell another loss.

    What was said or refused, and a hash of weights and optimizer state after each loading.
    ``only_at_first``: until something is loaded a second time.
    """
    loaded: list[str] = []

    def spoilt(chunks, batches, mesh, *, forward_only):
        found = microbatch_losses(chunks, batches, mesh, forward_only=forward_only)
        if not len(found) or (only_at_first and len(loaded) > 1):
            return found
        keys = [str(list(batch.sample_ids[0])) for batch in batches]
        return found * torch.tensor([wrong.get(key, 1.0) for key in keys])

    def load(start, config, engine):
        load_start(start, config, engine)
        digest = hashlib.sha256()
        for name, state in whole_state(engine).items():
            for tensor in (*state.values(), engine.parameters[name].detach()):
                digest.update(tensor.numpy().tobytes())
        loaded.append(digest.hexdigest() + str(engine.optimizer.num_updates))

    with (
        mock.patch("triptych.train.step.microbatch_losses", spoilt),
        mock.patch("triptych.train.run.load_start", load),
    ):
        return refusal(config) if refused else train(config), loaded


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Those of numbers."""
    kinds = ("update_skipped", "spike", "went_back")
    return [event for event in events.read_events(run_dir) if event["what"] in kinds]


def first_samples(run_dir: Path, step: int) -> list[str]:
    """A sample of each data-parallel rank's first microbatch of a step, as ``spoil`` names it."""
    ledgers = [path.read_text().splitlines() for path in (run_dir / "ledger").glob("*.jsonl")]
    lines = [line for ledger in ledgers for line in map(json.loads, ledger)]
    return [str(line["samples"][0]) for line in lines if line["step"] == step]


@pytest.fixture(scope="module")
def whole(pool, digits, tmp_path_factory) -> Path:
    """A run of two ranks in which nothing goes wrong."""
    runs = Runs(pool, digits, tmp_path_factory.mktemp("whole"))
    runs.train("whole", "dp2", "train.num_steps=9")
    return runs.dir("whole")


@distributed
def test_three_steps_in_a_row_end_a_run_and_two_do_not(runs, whole):
    """Steps 2 and 3, then 5 to 7; what is skipped has consumed its data, and is named."""
    wrong = {first_samples(whole, step)[0]: math.nan for step in (2, 3, 5, 6, 7)}
    words = ("train.num_steps=9", "run.checkpoint_every=1")
    (message, _), (other, _) = runs.call(spoil, "run", "dp2", *words, wrong=wrong, refused=True)
    assert message == other
    assert message.startswith("TrainingError: step 7: the loss of rank ")
    assert "is not finite, as in the 2 steps before" in message
    assert "none of them updated anything" in message
    assert f"launch/replay.py {runs.dir('run')} step=7 --run" in message
    lines = metrics(runs.dir("run"))
    skipped = [None, *["not finite"] * 2, None, *["not finite"] * 3]
    assert [line["skipped"] for line in lines] == skipped
    assert [line["loss"] is None for line in lines] == [text is not None for text in skipped]
    unspoilt = metrics(whole)[:7]
    assert [line["consumed_tokens"] for line in lines] == [
        line["consumed_tokens"] for line in unspoilt
    ]
    assert packs(runs.dir("run")) == {s: p for s, p in packs(whole).items() if s <= 7}
    for event, step in zip(read_events(runs.dir("run")), (2, 3, 5, 6, 7), strict=True):
        assert (event["what"], event["step"]) == ("update_skipped", step)
        assert {str(sample) for sample in event["samples"]} & wrong.keys()
        assert len(event["packs"]) == 1
        assert event["packs"][0] in packs(whole)[step]
    names = ["step_000000001.0", "step_000000004.0.tmp"]
    assert checkpoint_names(runs.dir("run")) == names, "step 4 was never proven"


@slow
@distributed
def test_skipped_steps_are_counted_across_a_resume(runs, whole):
    """The third in a row is the first step after it."""
    wrong = {first_samples(whole, step)[0]: math.nan for step in (3, 4, 5)}
    runs.call(spoil, "run", "dp2", "train.num_steps=4", wrong=wrong)
    numbers = json.loads((runs.dir("run") / "checkpoints/step_000000004.0/data.json").read_text())
    assert (numbers["train"]["num_skipped"], numbers["train"]["skipped_in_a_row"]) == (2, 2)
    assert set(numbers["num_updates"].values()) == {2}
    [(message, _), _] = runs.call(
        spoil, "run", "dp2", "train.num_steps=6", wrong=wrong, refused=True
    )
    assert message.startswith("TrainingError: step 5: the loss of rank ")


@slow
@distributed
@pytest.mark.parametrize("layout", ["dp2", "tp2 pp2"])
def test_weights_that_no_loss_has_proven_are_left_by_themselves(layout, runs, whole):
    """A run ends at step 4; three losses after it are no numbers, so step 2 is what it stands on.

    The data are trained on again, so all is as if nothing had happened.
    """
    every = ("run.checkpoint_every=2",)
    runs.call(train, "run", layout, *every, "train.num_steps=4")
    wrong = {sample: math.nan for step in (5, 6, 7) for sample in first_samples(whole, step)}
    words = (*every, "train.num_steps=9")
    (told, loaded), *_ = runs.call(spoil, "run", layout, *words, wrong=wrong, only_at_first=True)
    assert "step_000000004.0, step 4" in told
    assert "step_000000002.0, step 2" in told
    assert len(loaded) == 2
    if layout == "dp2":
        assert without_times(runs.dir("run")) == without_times(whole)
    assert packs(runs.dir("run")) == packs(whole)
    [*skipped, back] = read_events(runs.dir("run"))
    assert [event["step"] for event in skipped] == [5, 6, 7]
    assert (back["what"], back["step"], back["to_step"]) == ("went_back", 7, 2)
    assert not back["passed_over"]


@slow
@distributed
def test_a_spike_is_told_and_changes_nothing_by_default(runs, whole):
    wrong = {first_samples(whole, 6)[0]: 9.0}
    (told, _), *_ = runs.call(spoil, "run", "dp2", *SPIKES, "train.num_steps=9", wrong=wrong)
    assert "step 6: the loss is a spike (loss " in told
    assert "is 3 standard deviations above the mean of 3 steps" in told
    assert "weights were updated all the same" in told
    [event] = read_events(runs.dir("run"))
    assert (event["what"], event["step"]) == ("spike", 6)
    assert event["loss"] == metrics(runs.dir("run"))[5]["loss"] > event["loss_limit"]
    both = zip(losses(runs.dir("run")), losses(whole), strict=True)
    assert [ours == theirs for ours, theirs in both] == [step != 6 for step in range(1, 10)]


@slow
@distributed
def test_a_spike_that_is_skipped_updates_nothing(runs, whole):
    """Nor do later losses have to be like it. Without a checkpoint, roll_back does the same."""
    wrong = {first_samples(whole, 6)[0]: 9.0}
    for action in ("skip", "roll_back"):
        words = (*SPIKES, f"train.spikes.action={action}", "train.num_steps=9")
        runs.call(spoil, action, "dp2", *words, wrong=wrong)
        lines = metrics(runs.dir(action))
        assert [line["skipped"] for line in lines] == [*[None] * 5, "a spike", *[None] * 3]
        assert losses(runs.dir(action))[:5] == losses(whole)[:5]
        numbers = runs.dir(action) / "checkpoints/step_000000009.0/data.json"
        saved = json.loads(numbers.read_text())
        assert set(saved["num_updates"].values()) == {8}
        assert lines[5]["loss"] not in saved["train"]["recent_losses"]
        assert packs(runs.dir(action)) == packs(whole)
    assert losses(runs.dir("skip")) == losses(runs.dir("roll_back"))


ROLL_BACK = (*SPIKES, "train.spikes.action=roll_back", "run.checkpoint_every=2")


@distributed
@pytest.mark.parametrize("zero", ["megatron", pytest.param("deepspeed", marks=slow)])
def test_a_run_goes_back_and_passes_over_the_data(zero, runs, whole):
    """At step 7: 6 is not proven, so back to 4, and on with the packs after step 7."""
    wrong = {first_samples(whole, 7)[0]: 9.0}
    words = (*ROLL_BACK, "run.keep=9", f"optimizer.zero={zero}", "train.num_steps=9")
    (told, loaded, num_saving), *_ = runs.call(spoil_and_count, "run", "dp2", *words, wrong=wrong)
    assert "nothing was updated" in told
    assert "step_000000004.0, step 4" in told
    assert num_saving == 1, "the snapshot of before it went back takes no memory any more"
    check_gone_back(runs.dir("run"), whole)
    words = (*words, "train.num_steps=5", f"resume={runs.dir('run')}/checkpoints/step_000000004.0")
    (_, [fresh]), *_ = runs.call(spoil, "other", "dp2", *words, wrong=wrong)
    assert loaded[1] == fresh, "weights and moments are those of a process that starts there"


def spoil_and_count(config: Config, wrong: dict[str, float]) -> tuple[str, list[str], int]:
    """As ``spoil``; and how many of the hooks that save are there in the last step."""
    made: weakref.WeakSet[Checkpointing] = weakref.WeakSet()
    there = []

    class Counted(Checkpointing):
        def __init__(self, *args):
            super().__init__(*args)
            made.add(self)

        def after_step(self, event):
            there.append(len(made))
            super().after_step(event)

    with mock.patch("triptych.train.run.Checkpointing", Counted):
        told, loaded = spoil(config, wrong)
    return told, loaded, there[-1]


def check_gone_back(run_dir: Path, whole: Path) -> None:
    """Each step once; the ledger has every pack once, those passed over with the step after."""
    assert len(losses(run_dir)) == 9
    assert losses(run_dir)[:4] == pytest.approx(losses(whole)[:4], rel=1e-6)
    trained = [pack for step in packs(run_dir).values() for pack in step]
    assert sorted(trained) == [*range(16), *range(28, 48)]
    ledgers = [path.read_text().splitlines() for path in (run_dir / "ledger").glob("*.jsonl")]
    lines = [line for ledger in ledgers for line in map(json.loads, ledger)]
    passed = [line for line in lines if "passed_over" in line]
    assert {line["step"] for line in passed} == {5}
    found = [pack for line in passed for pack in line["passed_over"]["packs"]]
    assert sorted(found) == list(range(16, 28))
    assert all(line["passed_over"]["samples"] for line in passed)
    newest = run_dir / "checkpoints" / checkpoint_names(run_dir)[-1]
    state = json.loads((newest / "data.json").read_text())["train"]
    assert state["passed_over"] == [{"step": 4, "first_pack": 16, "end_pack": 28}]
    back = [event for event in read_events(run_dir) if event["what"] == "went_back"]
    assert {(event["step"], event["to_step"]) for event in back} == {(7, 4)}


@slow
@distributed
@pytest.mark.parametrize("call", [8, 10])
def test_killed_after_it_went_back_a_run_resumes_bit_for_bit(call, runs, whole):
    """At its 8th step it has saved nothing since it went back, and does so again; at its 10th,
    which is step 7 again, it has."""
    wrong = {first_samples(whole, 7)[0]: 9.0}
    words = (*ROLL_BACK, "train.num_steps=9")
    runs.call(spoil, "run", "dp2", *words, wrong=wrong)
    with pytest.raises(RankFailureError, match="died, exit code -9"):
        runs.call(spoil_and_die, "killed", "dp2", *words, wrong=wrong, call=call)
    runs.call(spoil, "killed", "dp2", *words, wrong=wrong)
    died = next(e for e in events.read_events(runs.dir("killed")) if e["what"] == "died")
    assert died["step"] == (5 if call == 8 else 7)
    check_gone_back(runs.dir("killed"), whole)
    assert without_times(runs.dir("killed")) == without_times(runs.dir("run"))


def spoil_and_die(config: Config, wrong: dict[str, float], call: int) -> None:
    """As ``spoil``; every rank kills itself when it has finished so many steps."""
    original, calls = Progress.after_step, itertools.count(1)

    def die(self, event):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, event)

    with mock.patch.object(Progress, "after_step", die):
        spoil(config, wrong)


@slow
@distributed
def test_a_run_goes_back_three_times_to_one_checkpoint_and_no_more(runs, whole):
    """Whatever the data are, the loss after step 5 is a spike, and before it none."""
    runs.train("longer", "dp2", "train.num_steps=20")
    firsts = {step: first_samples(runs.dir("longer"), step) for step in range(1, 21)}
    later = {sample: 9.0 for step in range(6, 21) for sample in firsts[step]}
    before = {
        sample
        for ledger in (whole / "ledger").glob("*.jsonl")
        for line in map(json.loads, ledger.read_text().splitlines())
        if line["step"] <= 5
        for sample in map(str, line["samples"])
    }
    wrong = {sample: factor for sample, factor in later.items() if sample not in before}
    words = (*ROLL_BACK, "run.checkpoint_every=4", "train.num_steps=20")
    (message, _), _ = runs.call(spoil, "run", "dp2", *words, wrong=wrong, refused=True)
    assert "the loss is a spike, and the run has gone back to step 4 3 times" in message
    back = [event for event in read_events(runs.dir("run")) if event["what"] == "went_back"]
    assert [event["to_step"] for event in back] == [4, 4, 4]


@slow
@distributed
def test_asked_to_stop_as_it_goes_back_a_run_stops(runs, whole):
    """In step 7, from which it goes back to 4: it asks after step 5, and ends after step 6."""
    wrong = {first_samples(whole, 7)[0]: 9.0}
    words = (*ROLL_BACK, "train.num_steps=9")
    (told, _), _ = runs.call(spoil_and_interrupt, "run", "dp2", *words, wrong=wrong, call=7)
    assert "stops after step 6, as asked by rank 0: SIGUSR1" in told
    assert json.loads((runs.dir("run") / "stopped.json").read_text())["requeue"]


def spoil_and_interrupt(config: Config, wrong: dict[str, float], call: int) -> Any:
    """As ``spoil``; rank 0 is given notice when it has finished so many steps."""
    original, calls = Progress.after_step, itertools.count(1)

    def interrupt(self, event):
        if next(calls) == call and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, event)

    with mock.patch.object(Progress, "after_step", interrupt):
        return spoil(config, wrong)


@slow
@distributed
def test_a_step_after_it_went_back_is_run_again_bit_for_bit(runs, whole):
    """Step 6 from the checkpoint of step 4, which does not know of the packs passed over."""
    wrong = {first_samples(whole, 7)[0]: 9.0}
    words = (*ROLL_BACK, "run.keep=9", "train.num_steps=9")
    runs.call(spoil, "run", "dp2", *words, wrong=wrong)
    told, _ = runs.call(step_run_again, "run", "dp2", *words, number=6)
    assert "step_000000004.0, step 4" in told
    assert "step 5: loss " in told
    assert "the same, bit for bit" in told


def step_run_again(config: Config, number: int) -> str:
    """What ``launch/replay.py --run`` says of a step."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), console(dist.get_rank()):
        run_again(Path(config.run.dir), config, number)
    return output.getvalue()

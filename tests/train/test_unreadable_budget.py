"""A run that cannot read its samples stops, on every rank after the same step, and says why."""

import json
import shutil
from pathlib import Path

import pytest

from triptych.configs.compose import load_config
from triptych.data.plan.order import Cursor
from triptych.errors import TrainingError
from triptych.tests.helpers.damage import flip_bits
from triptych.tests.helpers.runs import Runs, metrics
from triptych.train.hooks.unreadable_budget import UnreadableBudget
from triptych.train.state import TrainState

START = TrainState(
    step=0,
    consumed_tokens=0,
    consumed_samples=0,
    cursor=Cursor((0,), (0,)),
    segments=(),
)


@pytest.mark.parametrize(
    ("steps", "words", "told"),
    [  # of each step: samples, those with media, unreadable ones
        ([(100, 50, 10)], [], None),
        ([(100, 50, 11)], [], "11 of 100 samples"),
        ([(20_000, 9_000, 20)], [], None),
        ([(20_000, 9_000, 21)], [], "21 of 20,000 samples .* data.max_unreadable=0.001 of them"),
        ([(100, 50, 0)], ["data.max_unreadable=0"], None),
        ([(100, 50, 1)], ["data.max_unreadable=0"], "1 of 100 samples"),
        ([(100, 50, 50), (100, 49, 49)], ["data.max_unreadable=1"], None),
        ([(100, 50, 50), (9, 0, 0), (100, 50, 50)], ["data.max_unreadable=1"], "100 samples in a"),
        ([(100, 99, 99), (100, 50, 49), (99, 99, 99)], ["data.max_unreadable=1"], None),
        ([(9, 9, 9)], ["data.max_unreadable_in_a_row=9"], "data.max_unreadable_in_a_row=9$"),
    ],
)
def test_what_is_above_which_bound(steps, words, told, tmp_path):
    state = START
    for samples, with_media, unreadable in steps:
        state = state.after(
            num_tokens=1,
            num_samples=samples,
            num_with_media=with_media,
            num_unreadable=unreadable,
            cursor=START.cursor,
        )
    state = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    budget = UnreadableBudget(load_config([*words, f"run.dir={tmp_path}"]))
    if told is None:
        budget.on_start(state)
    else:
        with pytest.raises(TrainingError, match=f"(?m){told}"):
            budget.on_start(state)


def test_states_of_before_can_be_read():
    saved = START.to_json()
    del saved["num_unreadable"], saved["unreadable_in_a_row"]
    assert TrainState.from_json(saved) == START


@pytest.fixture(scope="module")
def unreadable(digits, tmp_path_factory) -> Path:
    """The sample data with a flipped bit in every picture."""
    root = tmp_path_factory.mktemp("unreadable") / "sample_data"
    shutil.copytree(digits, root)
    for name in ("strings", "captions", "every_kind"):
        flip_bits(root / name)
    return root


@pytest.mark.distributed
def test_a_run_whose_every_picture_is_unreadable_fails_on_every_rank(pool, unreadable, tmp_path):
    """With a checkpoint, from which it goes on where the bound is raised; killed, just the same."""
    runs = Runs(pool, unreadable, tmp_path)
    words = ("train.num_steps=8", "data.max_unreadable_in_a_row=60", "data.max_unreadable=1.0")
    refused = runs.refusal("run", "dp2", *words)
    assert refused.startswith("TrainingError: step ")
    assert "samples in a row could not be read, all of the last steps that have media" in refused
    damaged = r"strings: its bytes are not those that were prepared; step 1: strings, sample "
    assert damaged in refused
    assert "  captions: its bytes are not " in refused
    stopped = metrics(runs.dir("run"))[-1]["step"]
    assert 1 < stopped < 8
    assert refused.startswith(f"TrainingError: step {stopped}: ")
    again = runs.refusal("run", "dp2", *words)
    assert again.startswith(f"TrainingError: step {stopped}: ")
    more = (*words[:1], "data.max_unreadable_in_a_row=1000", "data.max_unreadable=1.0")
    assert "is finished" in runs.train("run", "dp2", *more)
    runs.kill(
        "killed",
        "dp2",
        *words,
        "run.checkpoint_every=1",
        target="triptych.train.hooks.progress.Progress.after_step",
        call=2,
    )
    assert runs.refusal("killed", "single", *words) == refused.replace("/run/", "/killed/")

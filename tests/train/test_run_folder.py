"""A run folder tells its story at a glance, and nothing that only tells it ends the run."""

import gzip
import json
import subprocess
from unittest import mock

import pytest
from PIL import Image

from triptych.checkpoints.environment import ROOT, git_state
from triptych.configs.schema import Config
from triptych.tests.helpers.runs import losses, train
from triptych.tests.train.test_hook_chain import EVENT, STATE, Recording
from triptych.train.events import read_events
from triptych.train.failures import collect_failures
from triptych.train.hooks.chain import HookChain
from triptych.train.hooks.harmless import Harmless
from triptych.train.hooks.loss_curve import draw


@pytest.mark.distributed
def test_what_ran_where_and_how_the_loss_fell(runs):
    """Also which step costs what, where ``train.profile`` asks: on one rank of each stage."""
    runs.train("run", "pp2", "train.num_steps=10", "train.profile=2..3")
    folder = runs.dir("run")
    told = json.loads((folder / "environment.json").read_text())
    saved = folder / "checkpoints" / "step_000000010.0" / "environment.json"
    assert json.loads(saved.read_text()) == told
    assert set(told["git"] or ("commit", "changed")) == {"commit", "changed"}
    assert told["host"]
    assert told["device"] == "cpu"
    assert told["packages"]["torch"].split("+")[0].count(".") == 2
    assert Image.open(folder / "loss_curve.png").size == (880, 495)
    traces = sorted((folder / "profile").iterdir())
    assert [path.name for path in traces] == [f"pp_0000{stage}.trace.json.gz" for stage in (0, 1)]
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in events) > 10


def test_the_curve_has_the_steps_before_a_resume_and_no_broken_line(tmp_path):
    lines = [json.dumps({"step": step, "loss": 9.0 / step}) for step in range(1, 30)]
    lines[3] = lines[3].replace("loss", "lors")  # a flipped bit
    lines[5] = lines[5].replace("step", "stec")
    lines[7] = json.dumps({"step": 8, "loss": None, "validation_loss": 3.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    draw(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss_curve.png"}
    assert Image.open(tmp_path / "loss_curve.png").size == (880, 495)


def test_the_code_is_named_by_its_commit(tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    (clone / "a.py").write_text("1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (clone / "a.py").write_text("2\n")
    told = git_state(clone)
    assert len(told["commit"]) == 40
    assert told["changed"] == ["a.py"]
    installed = clone / "site-packages"  # inside of a repository that is not its own
    installed.mkdir()
    assert git_state(installed) is None
    (installed / ".git").write_text("gitdir: nowhere\n")
    git_state.cache_clear()
    assert git_state(installed) is None
    assert (git_state(ROOT) is None) == (not (ROOT / ".git").exists())


@pytest.mark.parametrize("moment", ["on_start", "before_step", "after_step", "close"])
def test_a_harmless_hook_fails_once_and_alone(moment, caplog):
    calls: list = []
    harmless = Harmless(Recording("tracker", calls, fails_in=moment))
    chain = HookChain([harmless, Recording("other", calls)])
    with chain.running(STATE):
        for _ in range(2):
            chain.before_step(STATE)
            chain.after_step(EVENT)
    assert [name for call, name, _ in calls if call == moment].count("tracker") == 1
    assert [call for call, name, _ in calls if name == "tracker"][-1] == moment
    assert [name for call, name, _ in calls if call == "after_step"].count("other") == 2
    assert caplog.text.count("Recording fails and is left out from here on; the run goes on") == 1
    assert f"OSError: tracker fails in {moment}" in caplog.text


@pytest.mark.distributed
def test_a_tracker_and_a_picture_that_fail_end_no_run(runs):
    told = runs.call(train_with_failures, "run", "single", "train.num_steps=10", "log=wandb")[0]
    assert "warning: WandbTracker fails and is left out from here on; the run goes on: " in told
    assert "warning: LossCurve fails and is left out" in told
    assert len(losses(runs.dir("run"))) == 10


def train_with_failures(config: Config) -> str:
    """Train where W&B is not to be reached, and no picture can be drawn."""
    down, full = ConnectionError("unreachable"), OSError("no space left")
    with (
        mock.patch("wandb.init", side_effect=down),
        mock.patch("triptych.train.hooks.loss_curve.draw", side_effect=full),
    ):
        return train(config)


@pytest.mark.distributed
def test_an_error_while_hooks_are_made_is_left_for_the_next_start(runs):
    assert runs.call(train_without_a_ledger, "run", "dp2") == ["no room"] * 2
    assert [left["error"] for left in collect_failures(runs.dir("run"))] == ["OSError: no room"] * 2
    failed = read_events(runs.dir("run"))[-1]
    assert (failed["what"], failed["step"], failed["error"]) == ("failed", 0, "OSError: no room")


def train_without_a_ledger(config: Config) -> str:
    """The message of the error."""
    with mock.patch("triptych.train.run.Ledger", side_effect=OSError("no room")):
        with pytest.raises(OSError, match="no room") as failed:
            train(config)
    return str(failed.value)

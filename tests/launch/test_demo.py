"""The demo itself, in miniature, through real torchrun; and how it judges and draws."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from triptych.configs.compose import load_config, read_config
from triptych.launch.bar import state
from triptych.launch.digits import evaluate, plots
from triptych.launch.digits.evaluate import Reading, Scores
from triptych.launch.digits.recipe import FULL, Bars, below, runs_of
from triptych.tests.helpers.processes import wait_until_dead

ROOT = Path(__file__).parents[2]
LAST_LINE = re.compile(
    r"demo: accuracy=\d\.\d\d n=40 one_digit=\d\.\d\d two_digits=\d\.\d\d unseen_sizes=\d\.\d\d "
    r"blank=\d\.\d\d swapped=\d\.\d\d seconds=\d+"
)
GOOD = Scores(
    accuracy=0.9, n=400, one_digit=0.95, two_digits=0.85, unseen_sizes=0.9, blank=0.05, swapped=0.05
)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """(folder, output) of a miniature demo that went well."""
    folder = tmp_path_factory.mktemp("demo") / "runs"
    command = [sys.executable, "launch/demo.py", "--miniature", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def _environment():
    """Without what would make a child believe that it is a rank."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ours}


@pytest.mark.torchrun
def test_the_last_line_says_how_well_it_reads(miniature):
    _, output = miniature
    assert LAST_LINE.fullmatch(output.splitlines()[-1])
    assert "transformers reads 10 of 10 pictures as we do" in output


@pytest.mark.torchrun
def test_each_stage_starts_from_the_one_before_in_three_layouts(miniature):
    folder, output = miniature
    names = ["warmup", "stage1", "stage2", "stage3"]
    for before, name in zip([None, *names], names, strict=False):
        config = read_config(folder / name / "config.yaml")
        assert config.init.checkpoint == (None if before is None else f"{folder}/{before}")
    for layout in ("tp 1 x pp 2 x dp 1", "tp 2 x pp 1 x dp 1", "tp 1 x pp 1 x dp 2"):
        assert layout in output
    assert read_config(folder / "warmup" / "config.yaml").parallel.sequence_parallel


@pytest.mark.torchrun
def test_the_loss_falls_in_warmup_and_every_stage(miniature):
    folder, _ = miniature
    for name in ("warmup", "stage1", "stage2", "stage3"):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5]), name


@pytest.mark.torchrun
def test_readings_and_pictures_are_saved(miniature):
    folder, _ = miniature
    processor = json.loads((folder / "export" / "preprocessor_config.json").read_text())
    assert (processor["min_pixels"], processor["max_pixels"]) == (784, 12544), "those of the run"
    assert len(evaluate.load_readings(folder)) == 40
    for name in (plots.CURVES, plots.SHEET):
        with Image.open(folder / name) as image:
            assert min(image.size) > 300


@pytest.mark.torchrun
def test_the_demo_leaves_a_report_of_its_four_runs(miniature):
    folder, output = miniature
    page = (folder / "report.html").read_text()
    for name in ("warmup", "stage1", "stage2", "stage3"):
        assert f"Loss per supervised token, {name}" in page
    assert f"{folder}/contact_sheet.png" in page
    assert f"{folder}/report.html: 4 runs, " in output


@pytest.mark.torchrun
def test_one_image_from_the_command_line(miniature):
    folder, _ = miniature
    image = next((folder / "data/raw/images").glob("heldout_*.png"))
    tokenizer = folder / "data/tokenizer"
    command = [sys.executable, "launch/sample.py", "--checkpoint", str(folder / "stage3")]
    command += [
        "--tokenizer",
        str(tokenizer),
        "--image",
        str(image),
        "--prompt",
        "Read the evaluate.",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_bar_tells_share_rate_and_time_left():
    assert "  0 %  0/200 pictures" in state(0, 200, 1.0, "pictures")
    assert " 25 %  50/200 pictures  10/s  left 15 s" in state(50, 200, 5.0, "pictures")
    assert "100 %  200/200 pictures  10/s  took 20 s" in state(200, 200, 20.0, "pictures")


def test_what_is_below_the_bars_is_said():
    assert below(FULL.bars, GOOD) == []
    assert below(FULL.bars, replace(GOOD, accuracy=0.849)) == ["accuracy=0.849 is below 0.85"]
    assert below(FULL.bars, replace(GOOD, two_digits=0.7)) == ["two_digits=0.700 is below 0.75"]
    (problem,) = below(FULL.bars, replace(GOOD, blank=0.16))
    assert problem.startswith("blank=0.160 is above 0.15")
    everything = Bars(accuracy=1.0, each=1.0, controls=0.0)
    assert len(below(everything, GOOD)) == 5


def test_the_bars_are_those_of_the_issue():
    assert FULL.bars == Bars(accuracy=0.85, each=0.75, controls=0.15)
    assert (FULL.num_read, FULL.num_exported) == (400, 50)


@pytest.mark.parametrize("run", runs_of(FULL), ids=lambda run: run.name)
def test_the_budget_ends_every_stage(run):
    words = [f"stage={run.stage}", "model=demo", "data=digits", *run.overrides.split()]
    config = load_config(words)
    assert config.train.num_steps is None


def _reading(truth, answer, blank="", unseen=False):
    return Reading(
        truth=truth,
        answer=answer,
        answer_ids=[],
        answer_to_blank=blank,
        width=56,
        height=56,
        size_is_unseen=unseen,
    )


def test_scores():
    readings = [
        _reading("1", "1"),
        _reading("23", "23", unseen=True),
        _reading("4", "1", blank="4"),
        _reading("56", "5"),
    ]
    assert evaluate.score(readings) == Scores(
        accuracy=0.5,
        n=4,
        one_digit=0.5,
        two_digits=0.5,
        unseen_sizes=1.0,
        blank=0.25,
        swapped=0.25,  # the third picture's answer is the first one's truth
    )
    assert evaluate.score(readings).line() == (
        "accuracy=0.50 n=4 one_digit=0.50 two_digits=0.50 unseen_sizes=1.00 blank=0.25 swapped=0.25"
    )


def test_a_folder_of_something_else_is_not_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = subprocess.run(
        [sys.executable, "launch/demo.py", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "is no demo's" in done.stderr
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("number", "told"),
    [(signal.SIGTERM, "failed with exit code -15"), (signal.SIGINT, "KeyboardInterrupt")],
)
def test_terminated_it_ends_what_it_has_called(number, told):
    """Else torchrun and its ranks would train on, unseen.

    Whoever starts the tests in the background may have them ignore SIGINT: children inherit it.
    """
    call = "python -c 'import os, time; print(os.getpid(), flush=True); time.sleep(10**6)'"
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from triptych.launch.demo import _call; _call({call!r})"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as demo:
        called = next(int(line) for line in demo.stdout if line.strip().isdigit())
        while not handles(demo.pid, signal.SIGTERM):
            time.sleep(0.01)
        demo.send_signal(number)
        _, said = demo.communicate()
    assert told in said
    wait_until_dead([called])


def handles(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\t(\w+)", status)[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --prompt"),
        (["--image", "a.png"], "--image and --video need --prompt"),
        (["--video", "a.mp4", "--digits", "4"], "--image and --video need --prompt"),
        (["--video", "a.mp4", "--image", "a.png"], "not allowed with argument --video"),
        (["--digits", "4"], "--digits needs --output"),
    ],
)
def test_sample_says_what_is_missing_or_too_much(words, message):
    command = [sys.executable, "launch/sample.py", "--checkpoint", "x", "--tokenizer", "y", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr

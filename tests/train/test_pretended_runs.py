"""Whole runs on pretended CUDA devices, by the words of their command lines."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from triptych.configs.schema import Config
from triptych.launch import convert, sample
from triptych.tests.helpers.pretend_cuda import pretended_cuda
from triptych.tests.helpers.runs import OVERLAP, Runs, losses, metrics, train

pytestmark = pytest.mark.distributed
BAR = 1e-6
"""Of losses, relative."""
OPTIONS = (
    "model.vision.depth=1",
    "model.language.num_layers=2",
    "train.global_batch_size=2",
    "train.validate_every=3",
    "train.validation_packs=2",
    "run.checkpoint_every=2",
    "run.weights_every=2",
)
STEP = "tolist in train/step.py train_step"
"""The wait of each step."""


@pytest.fixture
def on_cpu(pool, digits, tmp_path) -> Runs:
    return Runs(pool, digits, tmp_path)


@pytest.fixture
def on_cuda(pretended_pool, digits, tmp_path) -> Runs:
    return Runs(pretended_pool, digits, tmp_path)


def train_on_cuda(config: Config) -> tuple[str, int]:
    """What this rank wrote, and how often it waited for a step's numbers."""
    with pretended_cuda() as device:
        said = train(config)
        assert not [wait for wait in device.waits if wait.in_microbatches]
        return said, [str(wait) for wait in device.waits].count(STEP)


def start_and_resume(on_cpu: Runs, on_cuda: Runs, layout: str, *options: str) -> Path:
    """Two steps and a checkpoint of each kind, then a third step, which validates."""
    for num_steps, num_read in ((2, 2), (3, 1)):
        words = (*OPTIONS, *options, f"train.num_steps={num_steps}")
        on_cpu.train("cpu", layout, *words)
        [(told, _), *_] = ranks = on_cuda.call(train_on_cuda, "cuda", layout, *words)
        assert [read for _, read in ranks] == [num_read for _ in ranks]
        assert "warning" not in told
    assert "step_000000002.0, step 2" in told
    folder = on_cuda.dir("cuda")
    assert (folder / "weights" / "step_000000002.0" / "COMMIT").exists()
    assert "validation_loss" in metrics(folder)[-1]
    return folder


def test_a_run_its_resume_and_its_commands_are_those_of_a_cpu(
    on_cpu, on_cuda, pool, pretended_pool, digits, tmp_path
):
    run = start_and_resume(on_cpu, on_cuda, "tp2", "train.precision=fp32")
    assert losses(run) == pytest.approx(losses(on_cpu.dir("cpu")), rel=BAR)
    validated = [metrics(run)[-1], metrics(on_cpu.dir("cpu"))[-1]]
    assert validated[0]["validation_loss"] == pytest.approx(
        validated[1]["validation_loss"], rel=BAR
    )

    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((56, 84), 128, np.uint8)).save(picture)
    options = {"run": run, "tokenizer": digits / "tokenizer", "picture": picture}
    [want] = pool(1).run(commands, folder=tmp_path / "on_cpu", **options)
    [found] = pretended_pool(1).run(commands_on_cuda, folder=tmp_path / "on_cuda", **options)
    assert found == want
    theirs = load_file(tmp_path / "on_cpu" / "hub" / "model.safetensors")
    ours = load_file(tmp_path / "on_cuda" / "hub" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def commands(run: Path, tokenizer: Path, picture: Path, folder: Path) -> str:
    """Export a run, import what came of it, and ask the model; returns the answer."""
    folder.mkdir()
    convert.main(["export", str(run), str(folder / "hub"), "--tokenizer", str(tokenizer)])
    convert.main(["import", str(folder / "hub"), str(folder / "imported")])
    question = ["--image", str(picture), "--prompt", "Read it.", "--max-new-tokens", "4"]
    answer = io.StringIO()
    with contextlib.redirect_stdout(answer):
        sample.main(["--checkpoint", str(run), "--tokenizer", str(tokenizer), *question])
    return answer.getvalue()


def commands_on_cuda(**options: Path) -> str:
    with pretended_cuda():
        return commands(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dp2", ("optimizer.zero=deepspeed",)),
        ("dp2 pp2 interleaved", ("model.language.num_layers=4", *OVERLAP)),
        ("tp2 pp2", ("parallel.sequence_parallel=true", "parallel.overlap.tp_comm=true")),
    ],
)
def test_runs_of_other_layouts_go_through_in_bf16(layout, options, on_cpu, on_cuda):
    larger = ("train.global_batch_size=4", "train.validation_packs=4", "train.precision=bf16")
    run = start_and_resume(on_cpu, on_cuda, layout, *larger, *options)
    assert losses(run) == pytest.approx(losses(on_cpu.dir("cpu")), rel=1e-2)

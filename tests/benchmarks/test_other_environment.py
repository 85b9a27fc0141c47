"""A folder answers alike in every environment; TRIPTYCH_OTHER_PYTHON names an interpreter more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.checkpoints.hf.conversion import export_hf
from triptych.configs.schema import Config
from triptych.tests.helpers.runs import Runs, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_transformers_of_each_environment_answers_as_we_do(pool, digits, tmp_path):
    runs, exported = Runs(pool, digits, tmp_path), tmp_path / "exported"
    runs.call(train_and_export, "run", "single", "train.num_steps=2", exported=exported)
    command = [sys.executable, "benchmarks/other_environment.py", str(runs.dir("run"))]
    other = os.environ.get("TRIPTYCH_OTHER_PYTHON")
    words = [str(exported), *(["--python", other] if other else [])]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("70 of 70 answers are ours") == 1 + bool(other)


def train_and_export(config: Config, exported: Path) -> None:
    train(config)
    export_hf(Path(config.run.dir), exported, Path(config.data.tokenizer))

"""A folder answers alike in every environment; TRIPTYCH_OTHER_PYTHON names an interpreter more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.benchmarks.other_environment import ask
from triptych.checkpoints.hf.conversion import export_hf
from triptych.configs.schema import Config
from triptych.tests.helpers.runs import Runs, train

ROOT = Path(__file__).parents[2]
INTERPRETER = """#!{python}
import json, sys
from pathlib import Path
import numpy as np
answers = Path(sys.argv[4])
answers.mkdir()
np.savez(answers / "pillow.npz", **{{"0": np.full(3, {pixel})}})
(answers / "pillow.json").write_text(json.dumps({{"transformers": "5.23.0", "answers": []}}))
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_transformers_of_each_environment_answers_as_we_do(pool, digits, tmp_path):
    runs, exported = Runs(pool, digits, tmp_path), tmp_path / "exported"
    runs.call(train_and_export, "run", "single", "train.num_steps=2", exported=exported)
    command = [sys.executable, "benchmarks/other_environment.py", str(runs.dir("run"))]
    other = os.environ.get("TRIPTYCH_OTHER_PYTHON")
    words = [str(exported), *(["--python", other] if other else [])]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("70 of 70 answers are ours") >= 1 + bool(other)


def test_two_environments_of_one_version_keep_their_own_pixels(tmp_path):
    found = []
    for pixel in (1, 2):
        python = tmp_path / f"python_{pixel}"
        python.write_text(INTERPRETER.format(python=sys.executable, pixel=pixel))
        python.chmod(0o755)
        found += ask(python, tmp_path, tmp_path, tmp_path / f"answers_{pixel}")
    assert [each.pixels["0"].tolist() for each in found] == [[1] * 3, [2] * 3]
    assert [each.told["transformers"] for each in found] == ["5.23.0"] * 2


def train_and_export(config: Config, exported: Path) -> None:
    train(config)
    export_hf(Path(config.run.dir), exported, Path(config.data.tokenizer))

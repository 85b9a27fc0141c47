"""The first hour, as docs/first_hour.md has it: its blocks are run in order in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first_hour.md"
INTERPRETERS = {"sh": ["bash", "-eu"], "python": [sys.executable, "-"]}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.torchrun
def test_the_commands_of_the_page_lead_to_an_answer(tmp_path):
    """Own data, tp 2, on as pp 2 with another rate, export, and transformers answers as we do."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")  # as a fresh clone: no runs, no data
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    blocks = BLOCK.findall(PAGE.read_text())
    assert [language for language, _ in blocks] == ["sh", "python", "sh", "sh", "sh", "python"]
    told = []
    for language, block in blocks:
        done = subprocess.run(
            INTERPRETERS[language],
            input=block,
            cwd=tmp_path,
            env=os.environ | {"PATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        told.append(done.stdout)

    _, _, prepared, trained, asked, answered = told
    assert "datasets/colours: 96 samples, 96 images" in prepared
    assert "tp 2 x pp 1" in trained
    assert "tp 1 x pp 2" in trained
    assert "resumed from runs/mine/checkpoints/step_000000020.0, step 20" in trained
    lines = (tmp_path / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert steps[20]["lr"]["llm"] < 0.6 * steps[19]["lr"]["llm"]

    ours = re.sub(r"<\|\w+\|>", "", asked.splitlines()[0])
    print(f"answer: {ours!r}")
    assert ours
    assert answered.splitlines()[-1] == ours

"""The measurement that weighs the cost model, as typed; what it prints is a cluster file."""

import subprocess
import sys
from pathlib import Path

import pytest

from triptych.configs.compose import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_what_it_prints_is_a_cluster_file(tmp_path):
    words = ["model=debug", "train.seq_len=512", "train.precision=fp32"]
    ended = subprocess.run(
        [sys.executable, "benchmarks/calibrate.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(ended.stdout)
    cluster = load_config(["--config-dir", str(tmp_path), "cluster=mine"]).cluster
    assert cluster.measured == ["peak_tflops", "efficiency"]
    assert cluster.peak_tflops > 0
    for part in ("vit", "linear", "attention", "head"):
        assert 0.05 < getattr(cluster.efficiency, part) < 1.5

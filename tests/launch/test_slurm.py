"""launch/slurm/pretrain.sbatch, submitted to a real Slurm of two nodes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITH_SLURM = ROOT / "tests" / "helpers" / "slurm" / "with_slurm.sh"
SBATCH_FILE = ROOT / "launch" / "slurm" / "pretrain.sbatch"

# Stands in for launch/pretrain.py where the test is about the job, not about training.
STAND_IN = """
import os, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
host, rank = os.uname().nodename, dist.get_rank()
# One write, so that lines of different ranks do not mix.
sys.stdout.write(f"host={host} rank={rank} total={int(total)} arguments={sys.argv[1:]}\\n")
sys.stdout.flush()
if "fail" in sys.argv and rank == 1:
    sys.exit("rank 1 gives up")
if "fail" in sys.argv:
    time.sleep(3600)
dist.destroy_process_group()
"""


def submit(tmp_path: Path, project: Path, *arguments: str, **env: str) -> tuple[str, str]:
    """Run the job on a cluster of two nodes, to its end. Returns the job's state and its log.

    Slurm ends a job that hangs after half an hour (``TIMEOUT``), so that its log is shown.
    """
    log = tmp_path / "job.log"
    # Not `sbatch --wait`, which looks every ten seconds.
    script = """
        sbatch --nodes=2 --time=30 --output="$0" "$@" >&2 || exit
        while [ -n "$(squeue --noheader)" ]; do sleep 0.2; done
        scontrol --oneliner show job
    """
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_TEST_ROOT": str(tmp_path / "slurm"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **env,
    }
    command = [WITH_SLURM, "2", "bash", "-c", script, log, SBATCH_FILE, *arguments]
    ended = subprocess.run(
        command,
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    state = re.search(r"JobState=(\w+)", ended.stdout)
    assert state is not None, ended.stdout + ended.stderr
    return state[1], log.read_text()


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    (project / "launch").mkdir(parents=True)
    (project / "launch" / "pretrain.py").write_text(STAND_IN)
    return project


@pytest.mark.slurm
def test_ranks_of_two_nodes_meet_and_get_the_arguments(tmp_path: Path, stand_in: Path):
    arguments = ["stage=2", "data.mixtures={a: 1, b: 2}", "empty="]
    state, log = submit(tmp_path, stand_in, *arguments, NPROC_PER_NODE="2")
    assert state == "COMPLETED", log
    lines = sorted(re.findall(r"host=(n\d) rank=(\d) total=(\d+) arguments=(.*)", log))
    assert [host for host, *_ in lines] == ["n0", "n0", "n1", "n1"]
    assert sorted(rank for _, rank, *_ in lines) == ["0", "1", "2", "3"]
    assert {(total, passed) for _, _, total, passed in lines} == {("10", str(arguments))}


@pytest.mark.slurm
def test_rank_that_fails_ends_the_job_on_every_node(tmp_path: Path, stand_in: Path):
    state, log = submit(tmp_path, stand_in, "fail")
    assert state == "FAILED", log
    assert "rank 1 gives up" in log


@pytest.mark.slurm
def test_training_runs_on_two_nodes(tmp_path: Path):
    run = tmp_path / "run"
    state, log = submit(tmp_path, ROOT, "stage=2", "train.num_steps=3", f"run.dir={run}")
    assert state == "COMPLETED", log
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3
    assert list((run / "checkpoints").glob("step_*/COMMIT")), log


def refusal(**env: str) -> str:
    """What the job script says, run without Slurm, where it ends before it needs it."""
    environment = {"PATH": os.environ["PATH"], **env}
    ended = subprocess.run(
        ["bash", SBATCH_FILE], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    return ended.stderr


def test_script_run_by_hand_says_how_to_submit_it():
    assert "submitted with sbatch" in refusal()


def test_submitting_from_elsewhere_says_from_where(tmp_path: Path):
    message = refusal(SLURM_SUBMIT_DIR=str(tmp_path))
    assert f"no launch/pretrain.py in {tmp_path} -> submit from the project's root" in message


def test_python_without_the_package_is_named(stand_in: Path):
    python = stand_in / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    message = refusal(SLURM_SUBMIT_DIR=str(stand_in))
    assert f"{python} cannot import triptych -> make .venv in {stand_in}" in message

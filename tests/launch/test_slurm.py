"""The files of launch/slurm, submitted to a real Slurm of two nodes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.tests.helpers.slurm_jobs import FOLLOW, ROOT, SBATCH_FILE, submit
from triptych.train.events import read_events

PREPARE = ROOT / "launch" / "slurm" / "prepare.sbatch"
GPU_CHECK = ROOT / "launch" / "slurm" / "gpu_check.sbatch"

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


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    (project / "launch").mkdir(parents=True)
    (project / "launch" / "pretrain.py").write_text(STAND_IN)
    return project


@pytest.mark.slow
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


NOTICE = """
    job=$(sbatch --parsable --nodes=2 --time=30 --output="$0" "$@") || exit
    until [ -s "$RUN/metrics.jsonl" ] || [ -z "$(squeue --noheader)" ]; do sleep 0.2; done
    scancel --signal=USR1 --batch "$job"
    until scontrol --oneliner show job "$job" | grep -q "Restarts=1" ||
      [ -z "$(squeue --noheader)" ]; do sleep 0.2; done
    scontrol --oneliner show job "$job"
    scancel "$job"
"""


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_that_is_given_notice_saves_and_is_requeued(tmp_path: Path):
    run = tmp_path / "run"
    endless = ["train.num_steps=null", "stage.token_budget=1000000000"]
    words = ["stage=2", *endless, f"run.dir={run}"]
    state, log = submit(tmp_path, ROOT, *words, script=NOTICE, RUN=str(run))
    assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), log
    stopped = json.loads((run / "stopped.json").read_text())
    assert stopped["requeue"], log
    assert set(stopped["asked_by"].values()) == {"SIGUSR1"}
    assert (run / "checkpoints" / f"step_{stopped['step']:09d}.0" / "COMMIT").exists(), log


# Another: its first start fails, the second goes on until it is told to stop, the third ends.
FAILS_THEN_WAITS = """
import signal, sys, time
from pathlib import Path
from triptych.train.events import record_event, read_events

def stop(number, frame):
    record_event(run, "stopped", step=start, requeue=number == signal.SIGUSR1)
    sys.exit()

run = Path(sys.argv[-1].removeprefix("run.dir="))
run.mkdir(exist_ok=True)
start = 1 + sum(event["what"] == "started" for event in read_events(run))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
record_event(run, "started", step=start)
if start == 1:
    sys.exit("the first start fails")
while start == 2:
    time.sleep(0.1)
record_event(run, "finished", step=start)
"""
NOTICED_CHAIN = """
    chain_of 4 "$@" || exit
    until_told 2 started
    scancel --signal=USR1 --batch "$(the_running)"
    until_none_is_left
"""
CANCELLED_CHAIN = """
    chain_of 4 "$@" || exit
    until_told 2 started
    scancel "$(the_running)"
    until_none_is_left
"""
REQUEUED = """
    chain_of 1 "$@" || exit
    until_told 2 started
    scancel --signal=USR1 --batch "$(the_running)"
    until_none_is_left
"""


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("script", "told", "states"),
    [
        (
            NOTICED_CHAIN,
            "started started stopped started finished",
            "FAILED COMPLETED COMPLETED CANCELLED",
        ),
        pytest.param(
            CANCELLED_CHAIN,
            "started started stopped",
            "FAILED CANCELLED CANCELLED CANCELLED",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            REQUEUED,
            "started started stopped started finished",
            "COMPLETED",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_jobs_go_on_after_a_failure_and_a_notice_until_the_run_ends_or_is_cancelled(
    script, told, states, tmp_path
):
    """A chain by its next job, a single one by being requeued. What is not needed is cancelled."""
    project = tmp_path / "project"
    (project / "launch").mkdir(parents=True)
    (project / "launch" / "pretrain.py").write_text(FAILS_THEN_WAITS)
    for name in ("slurm", "submit.py"):
        (project / "launch" / name).symlink_to(ROOT / "launch" / name)
    run = tmp_path / "run"
    words = ["stage=2", f"run.dir={run}"]
    script = FOLLOW + "shift\n" + script
    _, log = submit(tmp_path, project, *words, script=script, RUN=str(run), NODES="1")
    assert [event["what"] for event in read_events(run)] == told.split(), log
    jobs = (tmp_path / "job.log.jobs").read_text()
    assert re.findall(r"JobState=(\w+)", jobs) == states.split(), log


@pytest.mark.slow
@pytest.mark.slurm
def test_a_dataset_is_prepared_by_an_array_of_jobs(digits, tmp_path):
    """Then by one more, that puts the parts together: the bytes are those of one process.

    The input is one block, so the second task has nothing to do.
    """
    records = tmp_path / "texts.jsonl"
    records.write_text("".join(f'{{"text": "number {i} of many"}}\n' for i in range(40)))
    words = ["--input", str(records), "--tokenizer", str(digits / "tokenizer"), "--output"]
    script = """
        array=$(sbatch --parsable --array=1-2 --output="$0.%a" "$@") || exit
        sbatch --dependency=afterok:$array --kill-on-invalid-dep=yes --output="$0" "$@" >&2 || exit
        while [ -n "$(squeue --noheader)" ]; do sleep 0.2; done
        scontrol --oneliner show job
    """
    state, log = submit(
        tmp_path, ROOT, *words, str(tmp_path / "by_jobs"), file=PREPARE, script=script
    )
    assert state == "COMPLETED", log
    command = [sys.executable, ROOT / "launch" / "prepare.py", *words, tmp_path / "alone"]
    subprocess.run(command, check=True)
    made, alone = contents(tmp_path / "by_jobs"), contents(tmp_path / "alone")
    assert made == alone
    assert "dataset.yaml" in made


def contents(folder: Path) -> dict[str, bytes]:
    """What is of the dataset, by name."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.stem != "report"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.slurm
def test_the_gpu_check_has_all_ranks_for_the_layouts_and_one_process_for_the_rest(
    tmp_path: Path, stand_in: Path
):
    scripts = dict.fromkeys(("machine", "gpu_kernels", "gpu", "calibrate"), "print('one process')")
    for name, text in (scripts | {"gpu_layouts": STAND_IN}).items():
        path = stand_in / "benchmarks" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    shutil.copy(ROOT / "benchmarks" / "gpu_check.py", path.parent)
    (stand_in / "launch" / "slurm").mkdir()
    shutil.copy(SBATCH_FILE, stand_in / "launch" / "slurm")
    state, log = submit(tmp_path, stand_in, file=GPU_CHECK, NPROC_PER_NODE="2")
    assert state == "COMPLETED", log
    page = (stand_in / "runs" / "gpu_check" / "page.md").read_text()
    assert page.count("| met |") == 5
    assert page.count("one process") == 4
    hosts = re.findall(r"host=(n\d) rank=\d total=10", page)
    assert sorted(hosts) == ["n0", "n0", "n1", "n1"], page


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

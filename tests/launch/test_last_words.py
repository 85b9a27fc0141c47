"""What is last on the screen when a command fails, under real torchrun."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FAILS = """
import os, sys, time
from triptych.errors import DataError
from triptych.launch.cli import run

def main(argv):
    rank = int(os.environ["RANK"])
    if argv[0] == "interrupt":
        os.write(1, b"ready\\n")  # whole: print's line and its end are two writes, of two ranks
        time.sleep(600)
    if argv[0] == "bug":
        raise ValueError("of all ranks")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from triptych.parallel.mesh import init_distributed
        init_distributed(600)
        import torch.distributed as dist
        dist.barrier()
    if argv[0] == "killed" and rank == 1:
        os.kill(os.getpid(), 9)
    if rank == 1:
        raise DataError("cat.jpg is cut off  -> copy it again")
    dist.barrier()  # fails, for want of rank 1

run(main)
"""
NUM_RANKS = 2


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The script under torchrun, in a process group of its own, as a shell starts it."""
    script = folder / "fails.py"
    script.write_text(FAILS)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.torchrun
@pytest.mark.parametrize(
    ("kind", "message", "num_tracebacks"),
    [
        ("data", "[rank 1] DataError: cat.jpg is cut off  -> copy it again", 0),
        ("bug", "ValueError: of all ranks", 1),
        ("killed", "", 1),
    ],
)
def test_the_error_is_told_at_once_and_is_the_last_on_the_screen(
    kind, message, num_tracebacks, tmp_path
):
    process = start(tmp_path, kind)
    shown, _ = process.communicate()
    assert process.returncode == 1, shown
    *_, last, border = shown.rstrip().splitlines()
    assert set(border) == {"="}
    told, _, by_torchrun = shown.rpartition("Traceback (most recent call last)")
    if kind == "killed":  # torchrun may end rank 0 before it has told that rank 1 is gone
        assert re.search(r"Signal 9 \(SIGKILL\) received by PID \d+$", last), shown
        assert told.count("Traceback") <= num_tracebacks
    else:
        assert last.endswith(message), shown
        assert message in told
        assert told.count("Traceback") == num_tracebacks
    assert 'fails.py", line' not in by_torchrun


@pytest.mark.torchrun
def test_ctrl_c_is_answered_in_one_line(tmp_path):
    process = start(tmp_path, "interrupt")
    for _ in range(NUM_RANKS):
        while process.stdout.readline() not in ("ready\n", ""):
            pass
    os.killpg(process.pid, signal.SIGINT)
    shown, _ = process.communicate()
    assert process.returncode != 0
    assert shown.count("interrupted  -> type the command again") == 1
    assert 'fails.py", line' not in shown
    assert shown.count("Traceback") == 1, "torchrun's own"


def test_without_torchrun_the_message_is_the_last_line(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    for kind, lines in {"data": 1, "bug": 9}.items():
        done = subprocess.run(
            [sys.executable, str(tmp_path / "fails.py"), kind],
            env=os.environ | {"RANK": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        told = done.stderr.splitlines()
        assert told[-1].startswith("[rank 1] ")
        assert len(told) <= lines

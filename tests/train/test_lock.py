"""A run.dir belongs to one live run; nothing of a refused or killed one stands in the way."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from triptych.errors import ConfigError
from triptych.parallel.agree import SingleProcess
from triptych.tests.helpers.runs import Runs, losses
from triptych.train.lock import NAME, lock_run_dir

HOLDER = """
import os, sys
from pathlib import Path
from triptych.parallel.agree import SingleProcess
from triptych.train.lock import lock_run_dir
with lock_run_dir(Path(sys.argv[1]), SingleProcess()):
    if os.fork() == 0:  # as megatron-core's writers of checkpoints are
        print("held", os.getpid(), flush=True)  # the child: it has let go of the lock by now
    sys.stdin.read()  # until killed, or left alone
"""


def refusal(run_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught, lock_run_dir(run_dir, SingleProcess()):
        pass
    return str(caught.value)


def test_the_second_process_is_told_of_the_first_and_may_run_after_its_death(tmp_path):
    run_dir = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLURM_JOB_ID": "77"},
    )
    assert holder.stdout is not None
    held, child = holder.stdout.readline().split()
    assert held == "held"
    text = refusal(run_dir)
    assert text.startswith(f"run.dir={run_dir} is in use by process {holder.pid} on ")
    assert ", Slurm job 77, since 20" in text
    assert "-> wait until that run ends, or take another run.dir" in text

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run_dir / NAME).exists()
    try:
        with lock_run_dir(run_dir, SingleProcess()):
            assert f"process {os.getpid()} on " in refusal(run_dir)
    finally:
        os.kill(int(child), signal.SIGKILL)
    assert list(run_dir.iterdir()) == []


@pytest.mark.distributed
def test_every_rank_refuses_and_the_run_goes_on_afterwards(pool, digits, tmp_path):
    runs = Runs(pool, digits, tmp_path)
    runs.train("run", "dp2", "train.num_steps=1")
    before = sorted(tmp_path.rglob("*"))
    with lock_run_dir(runs.dir("run"), SingleProcess()):
        text = runs.refusal("run", "dp2", "train.num_steps=2")
    assert text.startswith(f"ConfigError: run.dir={runs.dir('run')} is in use by process ")
    assert sorted(tmp_path.rglob("*")) == before
    runs.train("run", "dp2", "train.num_steps=2")
    assert len(losses(runs.dir("run"))) == 2


def test_folders_that_stay_empty_are_removed(tmp_path):
    with lock_run_dir(tmp_path / "a" / "b" / "c", SingleProcess()):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock_run_dir(tmp_path / "a" / "b" / "c", SingleProcess()):
        (tmp_path / "a" / "b" / "written").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "written"]


def test_a_run_dir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "/file/run cannot be written: [Errno 20] Not a directory" in refusal(
        tmp_path / "file" / "run"
    )
    text = refusal(Path("/proc/run"))
    assert text.startswith("run.dir=/proc/run cannot be written: [Errno 2]")
    assert "-> run.dir=FOLDER, one with room where you may write" in text


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_run_dir(tmp_path, SingleProcess()):
        assert "Function not implemented; see to it that no other run" in caplog.text


def test_never_two_at_a_time(tmp_path):
    """Threads take and leave the lock as fast as they can: it is removed under the others."""
    inside, most, taken = 0, 0, 0
    counting = threading.Lock()

    def take(_: int) -> None:
        nonlocal inside, most, taken
        while taken < 300:
            try:
                with lock_run_dir(tmp_path, SingleProcess()):
                    with counting:
                        inside += 1
                        most = max(most, inside)
                        taken += 1
                    time.sleep(0.0001)
                    with counting:
                        inside -= 1
            except ConfigError:
                pass

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(take, range(4)))
    assert most == 1

"""Jobs on a real Slurm that lives as long as the test: ``slurm/with_slurm.sh``."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITH_SLURM = ROOT / "tests" / "helpers" / "slurm" / "with_slurm.sh"
SBATCH_FILE = ROOT / "launch" / "slurm" / "pretrain.sbatch"

# Not `sbatch --wait`, which looks every ten seconds.
TO_ITS_END = """
    sbatch --nodes=2 --time=30 --output="$0" "$@" >&2 || exit
    while [ -n "$(squeue --noheader)" ]; do sleep 0.2; done
    scontrol --oneliner show job
"""


def submit(
    tmp_path: Path,
    project: Path,
    *arguments: str,
    file: Path = SBATCH_FILE,
    script: str = TO_ITS_END,
    num_nodes: int = 2,
    **env: str,
) -> tuple[str, str]:
    """Run the job on a cluster, by default to its end. Returns its state and its log.

    Slurm ends a job that hangs after half an hour (``TIMEOUT``), so that its log is shown.
    """
    log = tmp_path / "job.log"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_TEST_ROOT": str(tmp_path / "slurm"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **env,
    }
    command = [WITH_SLURM, str(num_nodes), "bash", "-c", script, log, file, *arguments]
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


# Functions for the scripts of tests. The environment has RUN, its folder; NODES and, where they are
# other than usual, TIME in minutes and SIGNAL as sbatch takes them.
FOLLOW = """
    export LOG=$0 TIME=${TIME:-30}
    chain_of() {
      python launch/submit.py --nodes="$NODES" --time="$TIME" --jobs="$1" --notice-s=60 \\
        --sbatch=--output="$LOG" --sbatch=--open-mode=append \\
        ${SIGNAL:+--sbatch=--signal="$SIGNAL"} -- "${@:2}" >&2
    }
    until_told() { # so often at least, of this kind of event
      until [ "$(cat "$RUN/events.jsonl" 2>/dev/null | grep -c "\\"$2\\"")" -ge "$1" ] ||
        [ -z "$(squeue --noheader)" ]; do sleep 0.2; done
    }
    the_running() { squeue --noheader --states=RUNNING --format=%i; }
    until_none_is_left() {
      while [ -n "$(squeue --noheader)" ]; do sleep 0.2; done
      scontrol --oneliner show job | tee "$LOG.jobs"
    }
"""

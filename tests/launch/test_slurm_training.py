"""Training that a real Slurm cuts off: every step is made once, as without interruption."""

import re

import pytest

from triptych.tests.helpers.runs import Runs, losses, packs, without_times
from triptych.tests.helpers.slurm_jobs import FOLLOW, ROOT, submit
from triptych.train.events import read_events
from triptych.train.restarts import PastStart, read_starts

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.distributed]
STEPS = ("train.num_steps=150", "stage.token_budget=100000", "run.checkpoint_every=20")
"""More than are made until any of these scripts cuts in."""


@pytest.fixture
def runs(pool, digits, tmp_path) -> Runs:
    return Runs(pool, digits, tmp_path)


def follow(runs: Runs, script: str, *more: str, num_nodes: int = 2, **env: str) -> str:
    """Submit the run "cut" of two ranks, do what the script says; its log."""
    places = {"RUN": str(runs.dir("cut")), "NODES": "2", **env}
    words = runs.words("cut", "dp2", *STEPS, *more)
    folder = runs.dir("cut").parent
    script = f"{FOLLOW}shift\n{script}until_none_is_left\n"
    *_, log = submit(folder, ROOT, *words, script=script, num_nodes=num_nodes, **places)
    return log


def starts_of(runs: Runs) -> list[PastStart]:
    return read_starts(read_events(runs.dir("cut")))


def check_as_uninterrupted(runs: Runs, num_steps: int, *more: str) -> None:
    """Each step once, each pack once, and metrics those of ranks that nobody stopped."""
    assert len(losses(runs.dir("cut"))) == num_steps
    runs.train("whole", "dp2", *STEPS, *more, f"train.num_steps={num_steps}")
    assert without_times(runs.dir("cut")) == without_times(runs.dir("whole"))
    assert packs(runs.dir("cut")) == packs(runs.dir("whole"))


def jobs(folder) -> list[str]:
    """How each job of the cluster ended, by its number."""
    return re.findall(r"JobState=(\w+)", (folder / "job.log.jobs").read_text())


# A pattern that does not match itself, among the words of the shells that run this script.
CRASH_AND_NOTICE = """
    chain_of 4 "$@" || exit
    until_told 1 first_step
    kill -KILL "$(pgrep --oldest --full -- '[-]u launch/pretrain.py')"
    until_told 2 first_step
    scancel --signal=USR1 --batch "$(the_running)"
"""


def test_a_chain_goes_on_after_a_crash_and_a_notice_and_ends_with_the_run(runs, tmp_path):
    """The first job loses a rank, the second is given notice, the third ends, no other starts."""
    log = follow(runs, CRASH_AND_NOTICE)
    starts = starts_of(runs)
    assert [start.end for start in starts] == ["died", "stopped", "finished"], log
    assert [start.hosts for start in starts] == [("n0", "n1")] * 3
    assert starts[1].reached == starts[2].step
    assert log.count("pretrain.sbatch: job") == 3
    assert jobs(tmp_path) == ["FAILED", "COMPLETED", "COMPLETED", "CANCELLED"], log
    check_as_uninterrupted(runs, 150)


TIME_IS_UP = """
    chain_of 4 "$@" || exit
    until_told 2 first_step
    touch "$RUN/stop"
"""
ENDLESS = ("train.num_steps=null", "stage.token_budget=1000000000", "run.checkpoint_every=200")


@pytest.mark.parametrize("env", [{"TIME": "2"}, {"TIME": "1", "SIGNAL": "B:CONT@1"}])
def test_a_chain_goes_on_when_the_time_of_a_job_is_up(env, runs, tmp_path):
    """By Slurm's notice; or without one that is heard, by the TERM at its end, and KILL soon after.

    The second that trains is stopped for good, so the last of the chain never runs.
    """
    log = follow(runs, TIME_IS_UP, *ENDLESS, **env)
    first, *_, last = starts = starts_of(runs)
    assert {start.end for start in starts} <= {"stopped", "died"}, log
    assert first.reached > 0, log
    assert last.end == "stopped"
    assert jobs(tmp_path)[-1] == "CANCELLED", log
    check_as_uninterrupted(runs, last.reached, *ENDLESS)


POWER_CUT = """
    chain_of 1 "$@" || exit
    until_told 1 saved
    tests/helpers/slurm/node.sh down "$CUT"
"""


@pytest.mark.parametrize("cut", ["0", "1"])
def test_a_job_goes_on_with_other_nodes_when_one_loses_its_power(cut, runs, tmp_path):
    """The node where the job's script runs, or the other. Of three nodes, two are needed."""
    soon = {"SLURM_TEST_LOST_AFTER_S": "20"}
    words = ("cluster.hang_s=20", "train.num_steps=60")
    log = follow(runs, POWER_CUT, *words, num_nodes=3, CUT=cut, **soon)
    first, *_, last = starts = starts_of(runs)
    print(*starts, sep="\n")
    assert first.hosts == ("n0", "n1"), log
    assert last.end == "finished", log
    assert f"n{cut}" not in last.hosts, log
    assert jobs(tmp_path) == ["COMPLETED"], log
    check_as_uninterrupted(runs, 60)


CUT_IN_A_SAVE = """
    chain_of 1 "$@" || exit
    until [ -e "$STANDS" ] || [ -z "$(squeue --noheader)" ]; do sleep 0.2; done
    tests/helpers/slurm/node.sh down 0
"""
# Python runs it at its start, where the folder is on PYTHONPATH.
STANDS_IN_A_SAVE = """
import os, time
from pathlib import Path

if os.environ.get("RANK") == "0" and "SLURM_RESTART_COUNT" not in os.environ:
    from triptych.tests.helpers.known_place import PLACES_IN_A_SAVE, once_at

    def stand():
        Path(os.environ["STANDS"]).touch()
        time.sleep(3600)

    once_at(PLACES_IN_A_SAVE[os.environ["PLACE"]], stand)
"""


@pytest.mark.parametrize(("place", "resumed_from"), [("before COMMIT", 2), ("after COMMIT", 4)])
def test_a_node_that_loses_its_power_in_a_save_loses_no_more_than_that_save(
    place, resumed_from, runs, tmp_path
):
    """Its rank 0 stands still at a known place in the save of step 4 until the power is cut."""
    (tmp_path / "sitecustomize.py").write_text(STANDS_IN_A_SAVE)
    stands = {"PLACE": place, "STANDS": str(tmp_path / "stands"), "PYTHONPATH": str(tmp_path)}
    words = ("cluster.hang_s=20", "train.num_steps=8", "run.checkpoint_every=2")
    soon = {"SLURM_TEST_LOST_AFTER_S": "20"}
    log = follow(runs, CUT_IN_A_SAVE, *words, num_nodes=3, **soon, **stands)
    starts = starts_of(runs)
    assert (tmp_path / "stands").exists(), log
    assert [start.end for start in starts] == ["died", "finished"], log
    assert starts[1].step == resumed_from, log
    assert "n0" not in starts[1].hosts, log
    assert jobs(tmp_path) == ["COMPLETED"], log
    check_as_uninterrupted(runs, 8, *words)

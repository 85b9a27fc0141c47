"""What is submitted to Slurm, refused before it is, and started again when it has ended."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from triptych.errors import ConfigError
from triptych.launch.requeue import main as tell_whether
from triptych.launch.requeue import verdict
from triptych.launch.submit import main as submit
from triptych.train.events import record_event


@pytest.fixture(autouse=True)
def _in_the_projects_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


def commands(capsys, *words: str) -> list[list[str]]:
    """What would be typed."""
    submit([*words, "--dry-run"])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()[:-1]]


def test_a_chain_is_one_job_after_the_other_under_one_name(capsys, tmp_path):
    words = ["--nodes=2", "--gpus-per-node=4", "--time=1-0", "--jobs=3", "--sbatch=--account=me"]
    run = ["stage=2", "parallel=tp2", "data.mixtures={a: 1, b: 2}", f"run.dir={tmp_path}"]
    with pytest.raises(ConfigError, match=r"data\.mixtures"):
        commands(capsys, *words, *run)
    run.pop(2)
    first, second, third = commands(capsys, *words, *run)
    assert not any(word.startswith("--dependency") for word in first)
    assert "--dependency=afterany:JOB_1" in second
    assert "--dependency=afterany:JOB_2" in third
    for command in (first, second, third):
        assert {"--nodes=2", "--gpus-per-node=4", "--time=1-0", "--account=me"} < set(command)
        assert "--signal=B:USR1@300" in command
        assert "--export=ALL,TRIPTYCH_CHAIN=1" in command
        assert command[-3:] == run
    assert len({word for c in (first, second) for word in c if "job-name" in word}) == 1


def test_one_job_is_no_chain(capsys):
    [command] = commands(capsys, "--nodes=2", "--time=30", "--processes=2", "stage=2")
    assert "--export=ALL,TRIPTYCH_CHAIN=0,NPROC_PER_NODE=2" in command


@pytest.mark.parametrize("word", ["--jobs=0", "--nodes=-1", "--processes=x", "--notice-s=0"])
def test_counts_are_from_1_on(word, capsys):
    with pytest.raises(SystemExit):
        submit(["--nodes=1", "--time=30", word, "--dry-run"])
    name, _, value = word.partition("=")
    assert f"argument {name}: {value} must be a whole number from 1 on" in capsys.readouterr().err


def test_a_run_that_cannot_be_is_refused_before_it_waits(capsys):
    with pytest.raises(ConfigError, match="3 ranks must be a multiple of"):
        commands(capsys, "--nodes=3", "--time=30", "parallel.tp=2")


def test_from_elsewhere_it_says_from_where(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="submit from the project's root"):
        submit(["--nodes=1", "--time=30"])


def test_without_slurm_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch here"):
        submit(["--nodes=1", "--time=30"])


def told(what: str, time: float, **details: Any) -> dict[str, Any]:
    return {"what": what, "step": 3, "time": time, **details}


STOPPED = told("stopped", 20, requeue=False)
NOTICED = told("stopped", 20, requeue=True)
STARTED = told("started", 15)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize(
    ("events", "next_step"),
    [
        ([], ("done", "refused")),  # refused
        ([told("started", 5)], ("done", "refused")),  # refused, in this job
        ([STARTED], ("done", "again")),
        ([STARTED, told("failed", 18)], ("done", "again")),
        ([STARTED, told("finished", 20)], ("done", "done")),
        ([STARTED, STOPPED], ("done", "done")),
        ([STARTED, NOTICED], ("again", "again")),  # torchrun says 1 where it passed a signal on
        ([told("stopped", 5, requeue=True)], ("done", "refused")),
        ([STARTED, told("interrupted", 20)], ("done", "done")),
        ([told("started", 5), told("gave_up", 16)], ("done", "done")),
    ],
)
def test_what_starts_again_by_itself(events, next_step, failed):
    """Of a job that began at 10."""
    assert verdict(events, 10, failed=failed) == next_step[failed]


def test_a_job_script_is_told_in_a_word(capsys, tmp_path):
    record_event(tmp_path, "started", step=0)
    for status, word in {"1": "again", "0": "done"}.items():
        tell_whether(["0", status, "stage=2", f"run.dir={tmp_path}"])
        assert capsys.readouterr().out == f"{word}\n"

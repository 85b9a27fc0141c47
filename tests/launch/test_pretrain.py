"""The commands of the README, typed literally, in a folder that shows what they leave behind."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FIELDS = (
    "step time stage loss grad_norm skipped lr num_tokens num_supervised_tokens num_patches"
    " num_unreadable samples_by_source tokens_by_source num_decoded num_kept decode_s read_bytes"
    " consumed_tokens consumed_samples step_time_s data_s compute_s tokens_per_s flops flops_per_s"
    " mfu fill host_memory_bytes device_memory_bytes imbalance"
).split()


def type_in(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as typed in ``folder``; the two streams of the terminal in one."""
    return subprocess.run(
        command.split(),
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """As a fresh clone: no runs, no data."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder


@pytest.mark.torchrun
@pytest.mark.parametrize(
    "stage",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
)
def test_literal_command_trains_each_stage(stage, clone):
    """Stages 1 and 3 go through torchrun in the miniature demo, too."""
    before = cpu_s()
    ended = type_in(clone, f"torchrun launch/pretrain.py stage={stage}")
    used_s = cpu_s() - before
    print(f"stage={stage}: {used_s:.1f} CPU-seconds")
    assert ended.returncode == 0, ended.stdout
    told, _, _ = ended.stdout.partition(" step 1/20 ")
    assert "train.num_steps=20 ends them at 0.1 of the budget" in told
    assert "  -> stage.horizon=run or stage.token_budget=" in told

    run = clone / "runs" / "debug" / f"stage{stage}"
    metrics = lines(run)
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert list(metrics[0]) == FIELDS
    assert {tuple(line) for line in metrics[1:]} == {(*FIELDS, "left_s")}
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert (run / "checkpoints" / "step_000000020.0" / "COMMIT").exists()
    assert names(clone) == {"launch", "runs"}
    told_at_a_glance = {"environment.json", "loss_curve.png"}
    assert (
        names(run)
        == {"config.yaml", "metrics.jsonl", "events.jsonl", "ledger", "checkpoints"}
        | told_at_a_glance
    )


@pytest.mark.torchrun
def test_typed_again_it_is_finished_or_goes_on(clone):
    """In the folder of the test before; without torchrun, which is the same for one process."""
    run = clone / "runs" / "debug" / "stage2"
    if not run.exists():
        assert type_in(clone, "python launch/pretrain.py").returncode == 0
    before = lines(run)
    ended = type_in(clone, "python launch/pretrain.py stage=2")
    assert ended.returncode == 0
    assert "stage2 is finished: train.num_steps=20 reached" in ended.stdout
    assert lines(run) == before
    ended = type_in(clone, "python launch/pretrain.py stage=2 train.num_steps=22")
    assert ended.returncode == 0, ended.stdout
    assert "step_000000020.0, step 20" in ended.stdout
    assert lines(run)[:20] == before
    assert len(lines(run)) == 22


@pytest.mark.torchrun
def test_only_rank_0_writes_to_the_terminal(digits, tmp_path):
    words = f"parallel=tp2 train.num_steps=2 data.root={digits} run.dir={tmp_path / 'run'}"
    command = f"torchrun --nproc-per-node 2 {ROOT / 'launch' / 'pretrain.py'} {words}"
    ended = type_in(tmp_path, command, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stdout
    said = ended.stdout.splitlines()
    assert len(set(said)) == len(said)
    dated = re.compile(r"\d\d-\d\d \d\d:\d\d:\d\d (.*)")
    told = [dated.fullmatch(line)[1] for line in said]
    assert [line.split(" | ")[0] for line in told if " | " in line] == [
        "stage2 step 1/2",
        "stage2 step 2/2",
    ]
    assert sum("checkpoint: " in line for line in said) == 1
    assert "Warning" not in ended.stdout
    assert names(tmp_path) == {"run"}


@pytest.mark.torchrun
def test_a_configuration_that_cannot_run_is_refused_once(tmp_path):
    pretrain = ROOT / "launch" / "pretrain.py"
    command = f"torchrun --nproc-per-node 2 {pretrain} parallel.tp=3 train.seq_len=8"
    ended = type_in(tmp_path, command)
    assert ended.returncode == 1
    told, _, by_torchrun = ended.stdout.partition("Traceback (most recent call last)")
    for text in (told, by_torchrun.partition("Root Cause")[2]):
        assert text.count("ConfigError: ") == 1
        assert text.count("parallel.tp=3 must divide") == 2  # both towers
        assert text.count("train.seq_len=8 must hold") == 1
    assert 'pretrain.py", line' not in ended.stdout
    assert names(tmp_path) == set()


def test_a_refusal_does_not_wait_for_torch(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['pretrain.py', *sys.argv[2:]]\n"
        f"try: runpy.run_path({str(ROOT / 'launch' / 'pretrain.py')!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules, 'megatron' in sys.modules)"
    )
    for word, status in {"--help": 0, "parallel.tp=3": 1}.items():
        ended = subprocess.run(
            [sys.executable, "-c", code, "-", word],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == status, ended.stderr
        assert ended.stdout.endswith("False False\n")
        assert "Traceback" not in ended.stderr


def test_without_the_package_it_says_what_to_run(tmp_path):
    """``-S`` leaves out site-packages, ``-I`` what is in the environment."""
    command = f"{sys.executable} -I -S {ROOT / 'launch' / 'pretrain.py'} stage=2"
    ended = type_in(tmp_path, command)
    assert ended.returncode == 1
    assert ended.stdout.startswith("triptych is not installed for ")
    assert "-> make install" in ended.stdout
    assert "Traceback" not in ended.stdout

"""Any rank may ask a run to stop: all end after the same step, and it resumes bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import torch.distributed as dist

from triptych.configs.schema import Config
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.layouts import make_step
from triptych.tests.helpers.processes import wait_until_dead
from triptych.tests.helpers.runs import Runs, metrics, packs, train, without_times
from triptych.train.events import read_events
from triptych.train.hooks.chain import HookChain
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.hooks.stop_request import ONE_REQUEST_S, SIGNALS, StopRequest
from triptych.train.restarts import read_starts
from triptych.train.state import TrainState
from triptych.train.step import count
from triptych.train.stop import StopReason

pytestmark = pytest.mark.distributed

MESHES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
"""(tp, pp); dp is what is left of four ranks."""
ASKING = [(), (0,), (1,), (2,), (3,), (1, 2)]
"""Ranks."""
PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain.py"
slow = pytest.mark.slow


@pytest.mark.parametrize(("tp", "pp"), MESHES)
def test_all_ranks_learn_of_any_that_asks(tp, pp, pool):
    """In the one collective that counts samples and tokens anyway."""
    by_rank = pool(4).run(agreements, tp=tp, pp=pp)
    for asking, *found in zip(ASKING, *by_rank, strict=True):
        assert {stops for stops, _ in found} == {bool(asking)}
        assert {collectives for _, collectives in found} == {1}


def agreements(tp: int, pp: int) -> list[tuple[bool, int]]:
    """Whether this rank stops, and how many collectives that took, whoever asks."""
    mesh = build_mesh(tp, pp, seed=0, timeout_s=60)
    step = make_step("some", mesh, 1)
    names = ("all_reduce", "broadcast", "all_gather", "all_gather_object")
    found = []
    for asking in ASKING:
        counting = {name: mock.Mock(wraps=getattr(dist, name)) for name in names}
        with mock.patch.multiple(dist, **counting):
            totals = count(step, mesh, asks_to_stop=mesh.rank in asking)
        num_collectives = sum(calls.call_count for calls in counting.values())
        found.append((totals.num_asking_to_stop > 0, num_collectives))
    return found


class Asking(Hook):
    """Asks after one step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, event: StepEvent) -> StopReason | None:
        return StopReason("it is enough") if event.state.step == self._step else None


def train_and_ask(config: Config, rank: int, step: int) -> str:
    """Run the command; one rank asks after ``step``."""
    asking = [Asking(step)] if dist.get_rank() == rank else []
    with mock.patch("triptych.train.run.HookChain", lambda hooks: HookChain([*asking, *hooks])):
        return train(config)


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        pytest.param("single", 0, marks=slow),
        ("dp2", 1),
        pytest.param("tp2 pp2", 3, marks=slow),
        pytest.param("tp2", 1, marks=slow),
        pytest.param("pp2", 0, marks=slow),
        pytest.param("pp2", 1, marks=slow),
        pytest.param("dp2 pp2 interleaved", 2, marks=slow),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(layout, rank, runs):
    """Asked for after step 2, the end comes after step 3, on every rank, with a checkpoint."""
    runs.train("whole", layout, "train.num_steps=5")
    told, *silent = runs.call(
        train_and_ask, "stopped", layout, "train.num_steps=5", rank=rank, step=2
    )
    assert not any(silent)
    assert f"stage2 stops after step 3, as asked by rank {rank}: it is enough  -> type the " in told
    assert [line["step"] for line in metrics(runs.dir("stopped"))] == [1, 2, 3]
    assert {max(steps) for steps in ledger_steps(runs.dir("stopped"))} == {3}
    assert "step_000000003.0, step 3" in runs.train("stopped", layout, "train.num_steps=5")
    assert without_times(runs.dir("stopped")) == without_times(runs.dir("whole"))
    assert packs(runs.dir("stopped")) == packs(runs.dir("whole"))
    assert last_shards(runs.dir("stopped")) == last_shards(runs.dir("whole"))


@pytest.mark.parametrize(
    ("ask", "rank", "told", "requeue"),
    [
        ("USR1", 1, "rank 1: SIGUSR1", True),
        pytest.param("TERM", 1, "rank 1: SIGTERM", False, marks=slow),
        ("USR1 TERM TERM", 0, "rank 0: SIGTERM", False),
        pytest.param("", 0, "rank 0: the file {file}", False, marks=slow),
        ("requeue\n", 0, "rank 0: the file {file}", True),
    ],
)
def test_signals_and_a_file_stop_all_ranks_with_a_checkpoint(ask, rank, told, requeue, runs):
    """Asked for during step 2. What was left by a start that died asks nothing of this one."""
    folder = runs.dir("run")
    folder.mkdir()
    (folder / "stop").touch()
    (folder / "stopped.json").touch()
    often = ("train.num_steps=9", "run.checkpoint_every=2")  # a save is in flight in step 3
    said, *_ = runs.call(train_and_interrupt, "run", "dp2", *often, rank=rank, ask=ask)
    told = told.format(file=folder / "stop")
    assert f"stage2 stops after step 3, as asked by {told}  -> type the " in said
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    for step in (2, 3):
        assert (folder / "checkpoints" / f"step_{step:09d}.0" / "COMMIT").exists()
    who, why = told.split(": ")
    stopped = {"step": 3, "requeue": requeue, "asked_by": {who: why}}
    assert json.loads((folder / "stopped.json").read_text()) == stopped
    assert not (folder / "stop").exists()
    assert "is finished" in runs.train("run", "dp2", "train.num_steps=4")
    assert not (folder / "stopped.json").exists()


def train_and_interrupt(config: Config, rank: int, ask: str) -> str:
    """Run the command; one rank is interrupted in step 2."""
    before = [signal.getsignal(number) for number in SIGNALS]
    interrupting = [Interrupting(ask, Path(config.run.dir))] if dist.get_rank() == rank else []
    with mock.patch(
        "triptych.train.run.HookChain", lambda hooks: HookChain([*hooks, *interrupting])
    ):
        told = train(config)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    return told


class Interrupting(Hook):
    """Sends signals, or writes the file, as step 2 begins."""

    def __init__(self, ask: str, run_dir: Path) -> None:
        self._ask, self._run_dir = ask, run_dir

    def before_step(self, state: TrainState) -> None:
        if state.step != 1:
            return
        if "TERM" not in self._ask and "USR1" not in self._ask:
            (self._run_dir / "stop").write_text(self._ask)
            return
        for name in self._ask.split():
            os.kill(os.getpid(), signal.Signals[f"SIG{name}"])


def test_a_second_term_ends_a_process_at_once(monkeypatch, tmp_path):
    """Not one of the same moment: what Slurm sends to all comes once more through torchrun."""
    monkeypatch.setattr("triptych.train.hooks.stop_request.time.monotonic", lambda: now)
    now = 100.0
    if (child := os.fork()) == 0:
        StopRequest(tmp_path, SimpleNamespace(is_main=False)).on_start(state=None)
        for now in (100.0, 99.9 + ONE_REQUEST_S, 100.0 + ONE_REQUEST_S):
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / f"survived at {now}").touch()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert len(list(tmp_path.iterdir())) == 2


def test_who_wants_no_other_start_is_not_overruled(tmp_path):
    """A person's TERM, then Slurm's notice or the file that asks for the same as that."""
    stop = StopRequest(tmp_path, SimpleNamespace(is_main=True))
    for number, requeue in (
        (signal.SIGUSR1, True),
        (signal.SIGTERM, False),
        (signal.SIGUSR1, False),
    ):
        stop._asked(number, None)
        assert stop.after_step(event=None).requeue == requeue
    (tmp_path / "stop").write_text("requeue")
    assert stop.after_step(event=None) == StopReason("SIGTERM", requeue=False)


def test_what_was_asked_stays_asked_where_a_run_goes_back(tmp_path):
    stop = StopRequest(tmp_path, SimpleNamespace(is_main=False))
    for _ in range(2):
        stop.on_start(state=None)
        if stop.after_step(event=None) is None:
            os.kill(os.getpid(), signal.SIGUSR1)
        stop.close()
    assert stop.after_step(event=None) == StopReason("SIGUSR1", requeue=True)


def test_a_rank_whose_torchrun_has_ended_asks_to_stop_and_to_be_started_again(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    stop = StopRequest(tmp_path, SimpleNamespace(is_main=True))
    assert stop.after_step(event=None) is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    reason = stop.after_step(event=None)
    assert (reason.text, reason.requeue) == ("its torchrun has ended without it", True)


def test_a_process_that_its_shell_left_behind_trains_on(monkeypatch, tmp_path):
    """As after `nohup python launch/pretrain.py &` and the end of the terminal."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop = StopRequest(tmp_path, SimpleNamespace(is_main=True))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.after_step(event=None) is None


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_ranks_without_torchrun_save_and_end(number, runs):
    """Either signal ends the agent at once, and tells its ranks nothing."""
    folder = runs.dir("run")
    agent = start_torchrun(runs)
    ranks = psutil.Process(agent.pid).children(recursive=True)
    agent.send_signal(number)
    assert agent.wait() == -number
    wait_until_dead(rank.pid for rank in ranks)
    stopped = json.loads((folder / "stopped.json").read_text())
    assert stopped["requeue"]
    assert "its torchrun has ended without it" in stopped["asked_by"].values()
    assert (folder / "checkpoints" / f"step_{stopped['step']:09d}.0" / "COMMIT").exists()


def start_torchrun(runs: Runs, *launcher: str, num_steps: str = "null") -> subprocess.Popen[bytes]:
    """Two ranks, that train when this returns."""
    words = runs.words(
        "run", "pp2", "stage.token_budget=1000000000", f"train.num_steps={num_steps}"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agent = subprocess.Popen([*command, *launcher, PRETRAIN, *words], env=environment)
    while not (runs.dir("run") / "metrics.jsonl").exists():
        assert agent.poll() is None, "it ended before it could be asked"
        time.sleep(0.05)
    return agent


@pytest.mark.torchrun
@pytest.mark.slow
def test_torchrun_restarts_a_run_one_of_whose_ranks_was_killed(runs):
    folder = runs.dir("run")
    agent = start_torchrun(runs, "--max-restarts=2", num_steps="60")
    victim = psutil.Process(agent.pid).children()[-1]  # a rank; ranks may have children too
    victim.kill()
    assert agent.wait() == 0
    assert [line["step"] for line in metrics(folder)] == list(range(1, 61))
    died, finished = read_starts(read_events(folder))
    assert (died.end, finished.end) == ("died", "finished")
    assert not list((folder / "checkpoints").glob("*.tmp"))


@pytest.mark.torchrun
@pytest.mark.parametrize("ask", ["TERM", pytest.param("requeue", marks=slow)])
def test_torchrun_that_is_asked_to_stop_saves_first(ask, runs):
    """TERM reaches the ranks through torchrun, which exits with 1 then; after the file with 0."""
    folder = runs.dir("run")
    agent = start_torchrun(runs)
    if ask == "TERM":
        agent.terminate()
    else:
        (folder / "stop").write_text(ask)
    assert agent.wait() == (1 if ask == "TERM" else 0)
    stopped = json.loads((folder / "stopped.json").read_text())
    assert stopped["requeue"] == (ask == "requeue")
    assert stopped["step"] == metrics(folder)[-1]["step"]
    saved = folder / "checkpoints" / f"step_{stopped['step']:09d}.0"
    assert (saved / "COMMIT").exists()


def test_asked_at_the_end_it_is_finished(runs):
    told, *_ = runs.call(train_and_ask, "run", "dp2", "train.num_steps=3", rank=1, step=2)
    assert "stage2 is finished" in told
    assert "stops after" not in told


def ledger_steps(run_dir: Path) -> list[list[int]]:
    """The steps that each data-parallel rank has written down."""
    ledgers = (run_dir / "ledger").glob("*.jsonl")
    return [[json.loads(line)["step"] for line in f.read_text().splitlines()] for f in ledgers]


def last_shards(run_dir: Path) -> dict[str, str]:
    """File -> hash of the newest checkpoint's tensors."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    files = json.loads((newest / "MANIFEST.json").read_text())["files"]
    return {name: file["xxh3_128"] for name, file in files.items() if name.startswith("shards/_")}

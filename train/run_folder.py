"""What a start leaves in ``run.dir`` before it trains, and what it finds there of those before."""

import platform
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from triptych.checkpoints.environment import ROOT, git_state, write_environment
from triptych.checkpoints.layout import ENVIRONMENT
from triptych.configs.compose import save_config
from triptych.configs.schema import Config
from triptych.parallel.mesh import Mesh
from triptych.train.console import say
from triptych.train.events import read_events, record_event
from triptych.train.failures import collect_failures, suspected_hosts
from triptych.train.hooks.ledger import LEDGER
from triptych.train.hooks.stop_request import forget_stop
from triptych.train.json_lines import keep_until, last_line
from triptych.train.records import METRICS, QUARANTINE
from triptych.train.restarts import effective_share, read_starts, steps_trained_again
from triptych.train.start_up import StartUp
from triptych.train.state import TrainState


def tell_of_the_start_before(run_dir: Path, mesh: Mesh) -> None:
    """Record what became of a start that could not tell, before its records are cut.

    On the main rank, nothing on others.
    """
    if not mesh.is_main or not (starts := read_starts(read_events(run_dir))):
        return
    before = starts[-1]
    failures = collect_failures(run_dir)
    if before.end is not None:
        return
    step, seen = before.reached, before.ended
    metrics = last_line(run_dir / METRICS)
    if metrics is not None and metrics["step"] > step:
        step, seen = metrics["step"], _unix_time(metrics.get("time"), seen)
    record_event(
        run_dir,
        "died",
        step=step,
        last_seen=seen,
        failures=failures[:8],
        suspects=suspected_hosts(failures, before.hosts, before.world_size),
    )


def open_run_folder(
    config: Config, mesh: Mesh, state: TrainState, start_up: StartUp, damaged: list[str]
) -> None:
    """Make ``run.dir``, write what runs and where, and cut records of steps back to here.

    Only a run that will train does: what was refused leaves no trace. Every rank must call this.
    """
    run_dir = Path(config.run.dir)
    hosts = list(dict.fromkeys(mesh.world.all_gather(platform.node())))
    if mesh.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
        write_environment(run_dir / ENVIRONMENT, mesh)
        forget_stop(run_dir)
        _record_start(run_dir, mesh, state, start_up, hosts)
        for found in damaged:
            record_event(run_dir, "fell_back", step=state.step, damaged=found)
    cut_records(run_dir, mesh, state.step)


def cut_records(run_dir: Path, mesh: Mesh, step: int) -> None:
    """Cut what was written of steps after ``step``. Every rank must call this.

    All files of an earlier start are cut, of however many ranks, before any appends to its own.
    """
    dist.barrier()  # who still has to read its own has done so
    if mesh.is_main:
        for pattern in (METRICS, f"{LEDGER}/*.jsonl", f"{QUARANTINE}/*.jsonl"):
            for record in run_dir.glob(pattern):
                keep_until(record, step)
    dist.barrier()


def _record_start(
    run_dir: Path, mesh: Mesh, state: TrainState, start_up: StartUp, hosts: list[str]
) -> None:
    git = git_state(ROOT)
    record_event(
        run_dir,
        "started",
        step=state.step,
        begun=round(start_up.begun, 3),
        hosts=hosts,
        world_size=mesh.dims.world_size,
        layout=str(mesh.dims),
        commit=git and git["commit"],
        start_up_s=dict(start_up.parts_s),
    )
    starts = read_starts(read_events(run_dir))
    if len(starts) > 1:
        again = max(0, starts[-2].reached - state.step)
        say(
            f"restart {len(starts) - 1}: {again} steps are trained again, "
            f"{steps_trained_again(starts)} in all; effective training time "
            f"{effective_share(starts[:-1], start_up.begun, state.step):.0%}"
        )


def _unix_time(text: object, default: float) -> float:
    """Of a step's metrics; they are for people, and decide nothing."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return default

"""A step of a run once more, alone: what it gives now against what it gave then.

From the newest checkpoint before it, through the steps between, on the run's own configuration.
Nothing is written. Every rank must call what is here.
"""

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triptych.checkpoints.manifest import verify
from triptych.configs.schema import Config, ParallelConfig
from triptych.data.batch import Step
from triptych.data.plan.order import Cursor
from triptych.data.types import SampleId
from triptych.errors import CheckpointError
from triptych.launch.inspection.step_of_run import passed_over_before, saved_places
from triptych.parallel.device import be_deterministic
from triptych.parallel.mesh import Mesh, build_mesh
from triptych.train.console import say
from triptych.train.data import Mixture
from triptych.train.engine import Engine, build_engine
from triptych.train.json_lines import read_lines
from triptych.train.loop import place_after
from triptych.train.records import METRICS
from triptych.train.start import StartingPoint, load_start
from triptych.train.state import TrainState
from triptych.train.step import StepResult, drop_unreadable, microbatch_losses, train_step

ROUNDING = 1e-5
"""Relative: what another layout, or kernels that are not deterministic, may change."""
MOST_SAMPLES = 10
"""That are listed, of the largest loss."""


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """Of one sample alone, by the weights before the step."""

    sample: SampleId
    loss_sum: float
    num_supervised_tokens: int

    @property
    def loss(self) -> float:
        """Mean over its supervised tokens."""
        return self.loss_sum / max(1, self.num_supervised_tokens)


def run_again(run_dir: Path, config: Config, number: int) -> None:
    """Train up to a step, then tell its loss by sample, its gradient norm, and what differs.

    Raises:
        CheckpointError: there is no good checkpoint before it.
    """
    if config.train.deterministic:
        be_deterministic()
    parallel = config.parallel
    mesh = build_mesh(
        parallel.tp,
        parallel.pp,
        vpp=parallel.vpp,
        seed=config.seed,
        timeout_s=config.cluster.timeout_s,
    )
    data = Mixture.open(config, config.data.mixtures[config.stage.name])
    engine = build_engine(config, mesh)
    start = _start_before(run_dir, number, data.plan.hash, mesh)
    load_start(start, config, engine)
    told = {line["step"]: line for line in read_lines(run_dir / METRICS)}
    state = start.state
    with contextlib.closing(_steps_after(state, run_dir, config, data, mesh)) as steps:
        for step, cursor in steps:
            is_the_one = state.step + 1 == number
            if is_the_one:
                losses = _sample_losses(engine, data, config, step)
            before = told.get(state.step + 1, {})
            result = train_step(
                engine,
                step,
                engine.stage.learning_rates(state.consumed_tokens, state.step),
                # what was skipped then is skipped now, or the weights would be others
                loss_limit=-math.inf if before.get("skipped") and not is_the_one else math.inf,
                vetoes_spikes=True,
            )
            state = place_after(state, result, cursor, config.train.spikes)
            if is_the_one:
                break
            say(f"step {state.step}: {_compared(result, before)}")
    names = [source.name for source in data.plan.sources]
    say("\n".join([*_table(losses, names), *_verdict(result, told.get(number, {}), number)]))


def in_one_process(parallel: ParallelConfig) -> ParallelConfig:
    """The same without tensor and pipeline parallelism."""
    return ParallelConfig(recompute=parallel.recompute)


def _start_before(run_dir: Path, number: int, plan: str, mesh: Mesh) -> StartingPoint:
    for folder, state in saved_places(run_dir):
        is_usable = state.step < number and state.segments[-1].plan == plan
        if is_usable and not verify(folder, mesh.world):
            return StartingPoint(state, folder, resumes=True)
    raise CheckpointError(
        f"{run_dir} has no good checkpoint before step {number} of this plan of the data: what it "
        "started from is not kept  -> replay a later step, or leave --run out"
    )


def _steps_after(
    state: TrainState, run_dir: Path, config: Config, data: Mixture, mesh: Mesh
) -> Generator[tuple[Step, Cursor]]:
    """The steps as the run made them, each with the place after it.

    Where it went back, its checkpoint does not know of the packs that it then passed over.
    """
    ends = passed_over_before(run_dir)
    number, cursor = state.step + 1, state.cursor
    while True:
        more = ends.pop(number, 0) - cursor.num_packs
        _, cursor = data.plan.next_packs(cursor, max(0, more))
        with contextlib.closing(data.loader(config, mesh, cursor)) as loader:
            while number not in ends:
                yield next(loader), loader.cursor
                number, cursor = number + 1, loader.cursor


def _sample_losses(engine: Engine, data: Mixture, config: Config, step: Step) -> list[SampleLoss]:
    """Of all samples of the global batch, on every rank; those that are left out have no tokens."""
    mesh = engine.mesh
    samples = [sample for batch in step.microbatches for sample in batch.sample_ids]
    alone = data.one_by_one(config, mesh, samples)
    drop_unreadable(alone, mesh.world.all_gather(alone.unreadable)[mesh.media_reader])
    with torch.no_grad():
        sums = microbatch_losses(engine.chunks, alone.microbatches, mesh, forward_only=True)
    counts = [batch.num_supervised_tokens for batch in alone.microbatches]
    own = []
    if mesh.tp_rank == 0:  # the others have the same
        found = zip(samples, sums.tolist(), counts, strict=False)  # none but on the last stage
        own = [SampleLoss(*values) for values in found]
    return [loss for losses in mesh.world.all_gather(own) for loss in losses]


def _table(losses: Sequence[SampleLoss], names: Sequence[str]) -> list[str]:
    """The samples of the largest loss; what is no number comes first."""
    by_loss = sorted(losses, key=lambda found: (math.isfinite(found.loss), -found.loss))
    rows = [
        f"  {found.loss:>10.4f}  {found.num_supervised_tokens:>6}  "
        f"{names[found.sample.source]}, sample {found.sample.index}"
        for found in by_loss[:MOST_SAMPLES]
    ]
    return [
        f"loss of the {len(rows)} worst of {len(losses)} samples, each alone, and its tokens:",
        *rows,
    ]


def _compared(result: StepResult, before: Mapping[str, Any]) -> str:
    if result.veto is not None and before.get("skipped"):
        return f"skipped now as then ({before['skipped']})"
    pairs = [(n, getattr(result, n), before.get(n)) for n in ("loss", "grad_norm")]
    return ", ".join(f"{name} {_number(now)}, then {_number(then)}" for name, now, then in pairs)


def _verdict(result: StepResult, before: Mapping[str, Any], number: int) -> list[str]:
    """What it gave then and now, and what follows."""
    return [f"step {number}: {_compared(result, before)}", f"  -> {_what_follows(result, before)}"]


def _what_follows(result: StepResult, before: Mapping[str, Any]) -> str:
    if not before:
        return f"{METRICS} does not tell of this step: nothing to compare with"
    is_finite_now = result.veto is None
    if before.get("skipped") == "not finite":
        if is_finite_now:
            return (
                "it is finite here: not the data, but a flipped bit or another fault of the "
                "machine; events.jsonl names the rank whose loss it was"
            )
        return "it is not finite here either: the data of the samples above, or the weights"
    if not is_finite_now:
        return "it is finite in the run and not here: a fault of one of the two machines"
    apart = _apart(result, before)
    if apart == 0:
        return "the same, bit for bit: the data and the weights gave this, no flipped bit"
    if apart <= ROUNDING:
        return (
            f"the same but for rounding ({apart:.1e}), as another layout has it: the data and the "
            "weights gave this"
        )
    return (
        f"they differ ({apart:.1e}): a bit flipped since the checkpoint, in the run or here"
        "  -> run it again; the same here twice, and it was in the run"
    )


def _apart(result: StepResult, before: Mapping[str, Any]) -> float:
    """The largest relative difference; infinite where one has a number and the other none."""
    apart = 0.0
    for name in ("loss", "grad_norm"):
        now, then = getattr(result, name), before.get(name)
        if now is not None and then is not None:
            apart = max(apart, abs(now - then) / max(abs(then), 1e-30))
        elif name == "loss" and now is not then:
            return math.inf
    return apart


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"

"""Where a run starts: decided, and refused, before anything is loaded or told.

From its own newest checkpoint, from another one's weights, or from random ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from triptych.checkpoints.hf.starting_points import StartingPart, open_parts, table_of_fates
from triptych.checkpoints.layout import CheckpointFolder, step_folders
from triptych.checkpoints.locate import locate
from triptych.checkpoints.run_state import (
    load_numbers,
    load_optimizer,
    load_random_state,
    load_weights,
    refuse_other_model,
)
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.changes import Change, changes, table
from triptych.configs.overrides import schema_keys
from triptych.configs.schema import Config
from triptych.data.plan.order import Plan
from triptych.errors import CheckpointError, ConfigError
from triptych.models.init import init_parameters
from triptych.parallel.agree import Ranks
from triptych.train.console import say
from triptych.train.engine import Engine
from triptych.train.state import PlanSpan, TrainState

PLANNED_BY = (
    "seed",
    "train.seq_len",
    "data.max_patches",
    "data.min_pixels",
    "data.max_pixels",
    *(key for key in schema_keys() if key.startswith("data.video.")),
    "data.window",
    "data.weigh_by",
    "data.order",
)
"""Beside sources and the stage's mixture, all that the hash of a plan follows from."""


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """What a run goes on from."""

    state: TrainState
    checkpoint: Path | None
    """None where weights are random."""
    resumes: bool
    """All is taken from the checkpoint, not the weights alone."""
    told: str = ""
    """What is another than in the checkpoint that it resumes."""
    parts: Sequence[StartingPart] = ()
    """Published weights of the language model, the ViT or both."""


def find_start(config: Config, engine: Engine, plan: Plan, store: CheckpointStore) -> StartingPoint:
    """Decide where training begins; loads nothing. Every rank must call this.

    Raises:
        ConfigError: ``resume=never`` and the run has checkpoints, or another plan of the data than
            the checkpoint's.
        CheckpointError: nothing good to start from, or of another model or stage.
    """
    own = _own_checkpoint(config, store, engine.mesh.world)
    if own is not None:
        return _resumed(own, config, engine, plan)
    folder, parts = None, open_parts(config.init, config.model, Path(config.data.tokenizer))
    if config.init.checkpoint is not None:
        folder = locate(Path(config.init.checkpoint), engine.mesh.world)
        refuse_other_model(folder, config.model, engine.tensors)
    state = TrainState(
        step=0,
        consumed_tokens=0,
        consumed_samples=0,
        cursor=plan.start,
        segments=(PlanSpan(step=0, plan=plan.hash),),
    )
    return StartingPoint(state, folder, resumes=False, parts=parts)


def load_start(start: StartingPoint, config: Config, engine: Engine) -> None:
    """Set weights, optimizer and random state. Every rank must call this."""
    folder, mesh = start.checkpoint, engine.mesh
    if folder is None:
        _start_afresh(start.parts, config, engine)
        return
    load_weights(folder, engine.tensors)
    if start.resumes:
        load_optimizer(folder, engine.tensors, partly=False)
        goes_on = load_random_state(folder, mesh)
        note = "" if goes_on else " (other ranks or devices: random states start afresh)"
        say(f"resumed from {folder}, step {start.state.step}{note}{start.told}")
        return
    carried = "fresh"
    if config.init.optimizer_state:
        load_optimizer(folder, engine.tensors, partly=True)
        carried = "carried over for what goes on training"
    say(f"weights: {folder}; optimizer state {carried}; schedule and data from the start")


def _start_afresh(parts: Sequence[StartingPart], config: Config, engine: Engine) -> None:
    """From published weights and, where there are none, from random ones."""
    mesh = engine.mesh
    filled = {name: part for part in parts for name in part.entries if name in engine.parameters}
    whole = filled.keys() - {name for part in parts for name in part.drawn_in_part}
    init_parameters(engine.bare_chunks, engine.sharding, mesh, config.seed, but=whole)
    for name, part in filled.items():
        part.fill(name, engine.parameters[name], mesh.tp_rank, mesh.dims.tp)
    engine.optimizer.refresh_master_weights()
    if not parts:
        say(f"weights: random, drawn from seed={config.seed} (init.allow_random=true)")
        return
    names = {name for each in mesh.world.all_gather(list(engine.parameters)) for name in each}
    say(f"weights, what is initialised from seed={config.seed}:\n{table_of_fates(parts, names)}")


def _own_checkpoint(config: Config, store: CheckpointStore, ranks: Ranks) -> Path | None:
    if config.resume == "auto":
        if step_folders(store.root):
            say(f"reading the newest checkpoint in {store.root}, to see that it is good")
        return store.newest()
    if config.resume != "never":
        return locate(Path(config.resume), ranks)
    if step_folders(store.root):
        raise ConfigError(
            f"resume=never, but {store.root} has checkpoints  -> resume=auto, or another run.dir"
        )
    return None


def _resumed(folder: Path, config: Config, engine: Engine, plan: Plan) -> StartingPoint:
    numbers = load_numbers(folder)
    if numbers["stage"] != config.stage.name:
        raise CheckpointError(
            f"{folder} is of {numbers['stage']}, this run is {config.stage.name}"
            f"  -> init.checkpoint={folder} takes over its weights; use another run.dir"
        )
    refuse_other_model(folder, config.model, engine.tensors)
    state = TrainState.from_json(numbers["train"])
    changed = changes(CheckpointFolder(folder).config, config)
    told = f"; other than in its configuration:\n{table(changed)}" if changed else ""
    if state.segments[-1].plan != plan.hash:
        if not config.data.accept_new_plan:
            raise ConfigError(_other_plan(folder, state, config, plan, changed))
        state = state.on_new_plan(plan.hash, plan.start)
        told += (
            f"\ndata.accept_new_plan=true: the data start anew, by plan {plan.hash}; what was seen "
            f"until here, {state.consumed_samples:,} samples of {state.consumed_tokens:,} tokens, "
            "is not left out: it comes again"
        )
    return StartingPoint(state, folder, resumes=True, told=told)


def _other_plan(
    folder: Path, state: TrainState, config: Config, plan: Plan, changed: list[Change]
) -> str:
    causes = causes_of_another_plan(changed, config)
    if causes:
        restored = " ".join(f"{change.key}={change.before}" for change in causes)
        why = f"because of\n{table(causes)}\n  -> {restored}"
    else:
        why = (
            "though its keys are the same: a dataset of the mixture, or data.order, is other than "
            "it was  -> restore it"
        )
    return (
        f"{folder} was trained on the data plan {state.segments[-1].plan}, this configuration "
        f"plans {plan.hash}, {why}, or data.accept_new_plan=true to start the data anew from here: "
        f"the {state.consumed_samples:,} samples seen so far come again"
    )


def causes_of_another_plan(changed: list[Change], config: Config) -> list[Change]:
    """Those of the changes that a plan follows from."""
    mixture = f"data.mixtures.{config.stage.name}"
    of_sources = [
        f"data.sources.{name}.{key}"
        for name in config.data.mixtures[config.stage.name]
        for key in ("path", "max_epochs")
    ]
    return [
        change
        for change in changed
        if change.key in (*PLANNED_BY, *of_sources) or change.key.startswith(f"{mixture}.")
    ]

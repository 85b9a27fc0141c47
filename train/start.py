"""Where a run starts.

From its own newest checkpoint, from another one's weights, or from random ones.
"""

from pathlib import Path

from triptych.checkpoints.layout import step_folders
from triptych.checkpoints.locate import locate
from triptych.checkpoints.run_state import (
    load_numbers,
    load_optimizer,
    load_random_state,
    load_weights,
    refuse_other_model,
)
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.schema import Config
from triptych.data.plan.order import Plan
from triptych.errors import CheckpointError, ConfigError
from triptych.models.init import init_parameters
from triptych.parallel.agree import Ranks
from triptych.train.console import say
from triptych.train.engine import Engine
from triptych.train.state import PlanSpan, TrainState


def start(config: Config, engine: Engine, plan: Plan, store: CheckpointStore) -> TrainState:
    """Set weights and optimizer state, and say where training stands. Every rank must call this.

    Raises:
        ConfigError: ``resume=never`` and the run has checkpoints, or another plan of the data than
            the checkpoint's.
        CheckpointError: nothing good to start from, or of another model or stage.
    """
    folder = _own_checkpoint(config, store, engine.mesh.world)
    if folder is not None:
        return _resume(folder, config, engine, plan)
    _init_weights(config, engine)
    return TrainState(
        step=0,
        consumed_tokens=0,
        consumed_samples=0,
        cursor=plan.start,
        segments=(PlanSpan(step=0, plan=plan.hash),),
    )


def _own_checkpoint(config: Config, store: CheckpointStore, ranks: Ranks) -> Path | None:
    if config.resume == "auto":
        return store.newest()
    if config.resume != "never":
        return locate(Path(config.resume), ranks)
    if step_folders(store.root):
        raise ConfigError(
            f"resume=never, but {store.root} has checkpoints  -> resume=auto, or another run.dir"
        )
    return None


def _resume(folder: Path, config: Config, engine: Engine, plan: Plan) -> TrainState:
    numbers = load_numbers(folder)
    if numbers["stage"] != config.stage.name:
        raise CheckpointError(
            f"{folder} is of {numbers['stage']}, this run is {config.stage.name}"
            f"  -> init.checkpoint={folder} takes over its weights; use another run.dir"
        )
    refuse_other_model(folder, config.model, engine.tensors)
    state = TrainState.from_json(numbers["train"])
    planned_by = state.segments[-1].plan
    if planned_by != plan.hash:
        state = _on_new_plan(folder, state, config, plan)
    load_weights(folder, engine.tensors)
    load_optimizer(folder, engine.tensors, partly=False)
    same_ranks = load_random_state(folder, engine.mesh)
    note = "" if same_ranks else " (another number of ranks: random states start afresh)"
    say(f"resumed from {folder}, step {state.step}{note}")
    return state


def _on_new_plan(folder: Path, state: TrainState, config: Config, plan: Plan) -> TrainState:
    if not config.data.accept_new_plan:
        raise ConfigError(
            f"{folder} was trained on the data plan {state.segments[-1].plan}, this configuration "
            f"plans {plan.hash}: sources, mixture, seed, train.seq_len, data.max_patches, pixel "
            "limits or data.window differ  -> restore them, or data.accept_new_plan=true to start "
            "the data anew from here"
        )
    return state.on_new_plan(plan.hash, plan.start)


def _init_weights(config: Config, engine: Engine) -> None:
    mesh = engine.mesh
    if config.init.checkpoint is None:
        init_parameters(engine.bare_chunks, engine.sharding, mesh, config.seed)
        engine.optimizer.refresh_master_weights()
        say(f"weights: random, drawn from seed={config.seed} (init.allow_random=true)")
        return
    folder = locate(Path(config.init.checkpoint), mesh.world)
    refuse_other_model(folder, config.model, engine.tensors)
    load_weights(folder, engine.tensors)
    carried = "fresh"
    if config.init.optimizer_state:
        load_optimizer(folder, engine.tensors, partly=True)
        carried = "carried over for what goes on training"
    say(f"weights: {folder}; optimizer state {carried}; schedule and data from the start")

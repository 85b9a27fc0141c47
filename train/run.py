"""A whole run, from a validated configuration to its last checkpoint."""

import contextlib
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from triptych.checkpoints.layout import CHECKPOINTS
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.schema import Config
from triptych.data.plan.order import Plan
from triptych.errors import ConfigError, TrainingError
from triptych.parallel.agree import differing_ranks
from triptych.parallel.device import be_deterministic
from triptych.parallel.mesh import Mesh, build_mesh, init_distributed, meet, shutdown
from triptych.parallel.waits import measure_waits
from triptych.train.console import say, take_over_libraries
from triptych.train.crash_loop import refuse_crash_loop
from triptych.train.data import Mixture, generate_samples
from triptych.train.engine import Engine, build_engine
from triptych.train.evaluation_set import EvaluationSet
from triptych.train.events import record_event
from triptych.train.go_back import earlier_start
from triptych.train.hooks.answer_sheet import AnswerSheet
from triptych.train.hooks.chain import HookChain
from triptych.train.hooks.checkpoint import Checkpointing
from triptych.train.hooks.evaluation import Evaluation
from triptych.train.hooks.gone_wrong import GoneWrong
from triptych.train.hooks.harmless import Harmless
from triptych.train.hooks.history import History
from triptych.train.hooks.hook import Hook
from triptych.train.hooks.ledger import Ledger, trained_after
from triptych.train.hooks.loss_curve import LossCurve
from triptych.train.hooks.profiler import Profiler
from triptych.train.hooks.progress import Progress
from triptych.train.hooks.quarantine import Quarantine
from triptych.train.hooks.rank_balance import RankBalance
from triptych.train.hooks.slow_ranks import SlowRanks
from triptych.train.hooks.stop_request import StopRequest, tell_of_stop
from triptych.train.hooks.trackers import MetricsFile, TensorBoardTracker, WandbTracker
from triptych.train.hooks.unreadable_budget import UnreadableBudget, out_of_budget
from triptych.train.hooks.validation import Validation
from triptych.train.hooks.weights import WEIGHTS, WeightsOnly
from triptych.train.lock import lock_run_dir
from triptych.train.loop import is_finished, train
from triptych.train.run_folder import cut_records, open_run_folder, tell_of_the_start_before
from triptych.train.start import StartingPoint, find_start, load_start
from triptych.train.start_up import StartUp
from triptych.train.state import TrainState
from triptych.train.stop import GoBackError, StopReason, gather_reasons
from triptych.train.told import finished, introduce, stopped
from triptych.train.watch.place import Phase, enter
from triptych.train.watch.watchdog import watching


def pretrain(config: Config) -> TrainState:
    """Run one stage to its end, from wherever it stands. Every rank must call this.

    Raises:
        TriptychError: configuration, data or checkpoints do not allow it; says what to do.
    """
    start_up = StartUp()
    start_up.done("imports")
    if config.train.deterministic:
        be_deterministic()
    meeting = meet(config.cluster.timeout_s)
    with watching(config, meeting.store, meeting.rank, meeting.world_size):
        init_distributed(config.cluster.timeout_s, meeting)
        mesh = build_mesh(
            config.parallel.tp,
            config.parallel.pp,
            vpp=config.parallel.vpp,
            seed=config.seed,
            timeout_s=config.cluster.timeout_s,
        )
        measure_waits(mesh.axes)
        with lock_run_dir(Path(config.run.dir), mesh.world):
            start_up.done("groups")
            return _run_stage(config, mesh, start_up)


def _run_stage(config: Config, mesh: Mesh, start_up: StartUp) -> TrainState:
    enter(Phase.START, doing="data")
    generate_samples(config, mesh)
    data = Mixture.open(config, config.data.mixtures[config.stage.name])
    _refuse_different_plans(data.plan, mesh)
    _refuse_too_few_samples(data.plan, config)
    held_out = None
    if config.train.validate_every:
        held_out = Mixture.open(config, config.data.validation, once=True)
    questions = EvaluationSet.open(config) if config.train.evaluate_every else None
    start_up.done("data")
    enter(Phase.START, doing="model")
    engine = build_engine(config, mesh)
    start_up.done("model")
    take_over_libraries()
    run_dir = Path(config.run.dir)
    store = CheckpointStore(run_dir / CHECKPOINTS, mesh.world)
    enter(Phase.START, doing="weights")
    start = find_start(config, engine, data.plan, store)
    tell_of_the_start_before(run_dir, mesh)
    refuse_crash_loop(config, mesh, data, start.state)
    introduce(config, engine, data)  # whoever reads it knows that nothing was refused
    load_start(start, config, engine)
    state = start.state
    if _is_over(config, engine, data.plan, state):
        say(finished(config, state))
        return state
    start_up.done("weights")
    open_run_folder(config, mesh, state, start_up, store.damaged)
    lasting = history, _ = History(run_dir, mesh), StopRequest(run_dir, mesh)
    hooks_of = partial(_hooks, config, engine, held_out, questions, start_up, *lasting)
    with history.telling_errors():
        state, asked = _train_from(start, config, engine, data, hooks_of)
    if asked is not None and asked.is_error:
        raise TrainingError(out_of_budget(asked.text, config, state))
    if _is_over(config, engine, data.plan, state):
        say(finished(config, state))
        if mesh.is_main:
            record_event(run_dir, "finished", step=state.step)
    else:
        reasons = gather_reasons(mesh.world, asked)
        if mesh.is_main:
            tell_of_stop(run_dir, state.step, reasons)
        say(stopped(config, state, reasons))
    return state


def _train_from(
    start: StartingPoint,
    config: Config,
    engine: Engine,
    data: Mixture,
    hooks_of: Callable[..., HookChain],
) -> tuple[TrainState, StopReason | None]:
    """Train, and go on from an earlier checkpoint as often as the numbers go wrong."""
    mesh, run_dir = engine.mesh, Path(config.run.dir)
    passed_over = None
    while True:
        loader = data.loader(config, mesh, start.state.cursor)
        store = CheckpointStore(run_dir / CHECKPOINTS, mesh.world)
        try:
            with contextlib.closing(loader), contextlib.ExitStack() as stack:
                hooks = hooks_of(store=store, start=start, passed_over=passed_over)
                stack.enter_context(hooks.running(start.state))
                gc.collect()
                gc.freeze()  # no rank shall keep the others waiting to look through what stays
                stack.callback(gc.unfreeze)
                return train(config, engine, loader, start.state, hooks)
        except GoBackError as error:
            back = error.with_traceback(None)  # which would keep loader and hooks in memory
        enter(Phase.START, doing="weights of before")
        start = earlier_start(back, store)
        step = start.state.step
        passes_over = back.passes_over and mesh.reads_media
        passed_over = trained_after(step, run_dir, mesh) if passes_over else None
        if mesh.is_main:
            told = {"to_step": step, "passed_over": back.passes_over}
            record_event(run_dir, "went_back", step=back.state.step, **told)
        cut_records(run_dir, mesh, step)
        load_start(start, config, engine)


def leave() -> None:
    """Leave the process group at the end of a run that went well."""
    dist.barrier()
    shutdown()


def _refuse_different_plans(plan: Plan, mesh: Mesh) -> None:
    """Every rank plans by itself; all must have planned the same.

    Raises:
        ConfigError: on every rank; names the ranks that differ from rank 0.
    """
    if others := differing_ranks(mesh.world, plan.hash):
        raise ConfigError(
            f"ranks {others} planned other data than rank 0: their dataset folders differ"
            "  -> let all nodes read the same folders"
        )


def _refuse_too_few_samples(plan: Plan, config: Config) -> None:
    """Learning rates follow the budget: a stage whose data end before would never decay.

    Raises:
        ConfigError: every source ends, or the order that was brought, before the budget is used up.
    """
    has, budget = plan.expected_tokens, config.stage.token_budget
    if plan.ends and has < budget and config.train.num_steps is None:
        raise ConfigError(
            f"stage.token_budget={budget} is more than the {has} tokens that data.order has, or "
            f"all sources at their max_epochs  -> stage.token_budget={has}, or more data"
        )


def _is_over(config: Config, engine: Engine, plan: Plan, state: TrainState) -> bool:
    """Whether the stage is finished, or the plan has no whole step after this place."""
    if is_finished(config, engine, state):
        return True
    if not plan.ends:
        return False
    packs, _ = plan.next_packs(state.cursor, config.train.global_batch_size)
    return len(packs) < config.train.global_batch_size


def _hooks(
    config: Config,
    engine: Engine,
    held_out: Mixture | None,
    questions: EvaluationSet | None,
    start_up: StartUp,
    history: History,
    stop_request: StopRequest,
    *,
    store: CheckpointStore,
    start: StartingPoint,
    passed_over: dict[str, Any] | None,
) -> HookChain:
    """Everything optional.

    What fails on all ranks comes first, for one reason on all. Saving comes last: a checkpoint's
    steps have been written down then. Where the run goes back, ``history`` and ``stop_request`` go
    on, and all others are made anew.
    """
    mesh, run_dir = engine.mesh, Path(config.run.dir)
    hooks: list[Hook] = [
        history,
        UnreadableBudget(config),
        stop_request,
        SlowRanks(run_dir, mesh, config.run.checkpoint_every),
    ]
    if held_out is not None:
        hooks.append(Validation(config, engine, held_out.validation_step(config, mesh)))
    if questions is not None:
        evaluation = Evaluation(config, engine, questions)
        hooks.append(evaluation)
        if mesh.is_main:
            hooks.append(Harmless(AnswerSheet(config, evaluation, questions)))
    if mesh.is_main:
        hooks += [RankBalance(), MetricsFile(run_dir)]
        hooks.append(Harmless(LossCurve(config, run_dir)))
        if config.log.wandb:
            hooks.append(Harmless(WandbTracker(config, run_dir)))
        if config.log.tensorboard:
            hooks.append(Harmless(TensorBoardTracker(run_dir)))
    if config.train.profile and (mesh.dp_rank, mesh.tp_rank) == (0, 0):
        hooks.append(Harmless(Profiler(config, mesh)))
    if mesh.reads_media:
        sources = list(config.data.mixtures[config.stage.name])
        hooks += [Ledger(run_dir, mesh, passed_over), Quarantine(run_dir, mesh, sources)]
    checkpointing = Checkpointing(config, engine, store)
    gone_wrong = GoneWrong(config, mesh, start, checkpointing)
    hooks += [Progress(config, mesh, start_up), gone_wrong, checkpointing]
    if config.run.weights_every:
        weights = CheckpointStore(run_dir / WEIGHTS, mesh.world)
        hooks.append(WeightsOnly(config, engine, weights))
    return HookChain(hooks)

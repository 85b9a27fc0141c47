"""The loop."""

import time

from triptych.configs.schema import Config, SpikeAction, SpikesConfig
from triptych.data.loading.loader import Loader
from triptych.data.plan.order import Cursor
from triptych.train.engine import Engine
from triptych.train.hooks.chain import HookChain
from triptych.train.hooks.hook import StepEvent
from triptych.train.metrics import StepTimes, step_metrics
from triptych.train.spikes import loss_limit
from triptych.train.state import TrainState
from triptych.train.step import StepResult, train_step
from triptych.train.stop import StopReason
from triptych.train.watch.place import Phase, enter, learn


def train(
    config: Config, engine: Engine, loader: Loader, state: TrainState, hooks: HookChain
) -> tuple[TrainState, StopReason | None]:
    """Train until budget or data are used up, ``train.num_steps`` is reached, or the ranks stop.

    Returns where training stands, and why this rank asked to stop, if it did. Every rank must call
    this.
    """
    asked, stops, spikes = None, False, config.train.spikes
    while not (stops or loader.is_over or is_finished(config, engine, state)):
        hooks.before_step(state)
        enter(Phase.DATA, state.step + 1)
        start = time.perf_counter()
        step = next(loader)
        has_data = time.perf_counter()
        enter(Phase.COMPUTE)
        lr = engine.stage.learning_rates(state.consumed_tokens, state.step)
        result = train_step(
            engine,
            step,
            lr,
            loss_limit=loss_limit(state.recent_losses, spikes),
            vetoes_spikes=spikes.action is not SpikeAction.warn,
            asks_to_stop=asked is not None,
            asks_to_save=hooks.asks_to_save(),
        )
        stops = result.totals.num_asking_to_stop > 0
        state = place_after(state, result, loader.cursor, spikes)
        times = StepTimes(data_s=has_data - start, compute_s=time.perf_counter() - has_data)
        learn(times.step_s)
        metrics = step_metrics(config, state, result, times, engine.mesh.dims.world_size)
        is_last = stops or loader.is_over or is_finished(config, engine, state)
        asked = hooks.after_step(StepEvent(state, result, step, is_last, metrics)) or asked
    return state, asked


def place_after(
    state: TrainState, result: StepResult, cursor: Cursor, spikes: SpikesConfig
) -> TrainState:
    """Where a run stands after a step that led to ``cursor``."""
    totals = result.totals
    return state.after(
        num_tokens=totals.workload.num_tokens,
        num_samples=totals.num_samples,
        num_with_media=totals.num_with_media,
        num_unreadable=totals.num_unreadable,
        cursor=cursor,
    ).judged(result.loss, is_skipped=result.veto is not None, window=spikes.window)


def is_finished(config: Config, engine: Engine, state: TrainState) -> bool:
    """Whether the budget is used up, or the cap reached."""
    cap = config.train.num_steps
    return engine.stage.is_finished(state.consumed_tokens) or (
        cap is not None and state.step >= cap
    )

"""The loop."""

import time
from collections.abc import Sequence

from triptych.configs.schema import Config
from triptych.data.loading.loader import Loader
from triptych.train.engine import Engine
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.hooks.metrics import step_metrics
from triptych.train.state import TrainState
from triptych.train.step import train_step


def train(
    config: Config, engine: Engine, loader: Loader, state: TrainState, hooks: Sequence[Hook]
) -> TrainState:
    """Train until the stage's token budget is used up, or ``train.num_steps`` is reached.

    Every rank must call this.
    """
    while not is_finished(config, engine, state):
        start = time.perf_counter()
        step = next(loader)
        lr = engine.stage.learning_rates(state.consumed_tokens)
        result = train_step(engine.optimizer, step, lr, engine.mesh, number=state.step + 1)
        totals = result.totals
        state = state.after(
            num_tokens=totals.workload.num_tokens,
            num_samples=totals.num_samples,
            cursor=loader.cursor,
        )
        elapsed_s = time.perf_counter() - start
        metrics = step_metrics(config, state, result, elapsed_s, engine.mesh.dims.world_size)
        event = StepEvent(state, result, step, is_finished(config, engine, state), metrics)
        for hook in hooks:
            hook.after_step(event)
    return state


def is_finished(config: Config, engine: Engine, state: TrainState) -> bool:
    """Whether the budget is used up, or the cap reached."""
    cap = config.train.num_steps
    return engine.stage.is_finished(state.consumed_tokens) or (
        cap is not None and state.step >= cap
    )

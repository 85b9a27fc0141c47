"""Checkpoints of weights only, every ``run.weights_every`` steps, kept for ever.

A seventh of a whole checkpoint in bf16, a quarter in fp32: to evaluate, to export, to start from.
No run resumes from one, so they lie in a folder of their own.
"""

from triptych.checkpoints.run_state import save_weights
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.schema import Config
from triptych.errors import CheckpointError
from triptych.train.console import say
from triptych.train.engine import Engine
from triptych.train.hooks.hook import Hook, StepEvent

WEIGHTS = "weights"
"""The folder in ``run.dir``."""


class WeightsOnly(Hook):
    """On every rank: each writes its share, rank 0 commits."""

    def __init__(self, config: Config, engine: Engine, store: CheckpointStore) -> None:
        self._config, self._engine, self._store = config, engine, store

    def after_step(self, event: StepEvent) -> None:
        """Save where it is time to; training's numbers stay as they are."""
        step = event.state.step
        if step % self._config.run.weights_every:
            return
        try:
            writer = self._store.begin(step)
            save_weights(writer.folder, self._engine.tensors)
            writer.describe(self._config.model, self._config)
            final = writer.commit({"stage": self._config.stage.name})
        except CheckpointError as error:
            raise CheckpointError(
                f"weights of step {step} could not be saved in {self._store.root}:\n{error}\n"
                "  -> mend the cause and type the command again: the run resumes"
            ) from error
        say(f"weights: {final}")

"""Checkpoints of weights only, every ``run.weights_every`` steps, kept for ever.

A seventh of a whole checkpoint in bf16, a quarter in fp32: to evaluate, to export, to start from.
No run resumes from one, so they lie in a folder of their own.
"""

from triptych.checkpoints.background_save import BackgroundSave
from triptych.checkpoints.run_state import RunSnapshot
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.schema import Config
from triptych.train.console import say
from triptych.train.engine import Engine
from triptych.train.hooks.hook import Hook, StepEvent

WEIGHTS = "weights"
"""The folder in ``run.dir``."""


class WeightsOnly(Hook):
    """On every rank: each writes its share beside training, rank 0 commits."""

    def __init__(self, config: Config, engine: Engine, store: CheckpointStore) -> None:
        self._config = config
        self._save = BackgroundSave(store, engine.mesh.world, keep=None)
        self._snapshot = RunSnapshot(engine.tensors, config)

    def after_step(self, event: StepEvent) -> None:
        """Go on with the save in flight; begin one where it is time to."""
        step = event.state.step
        is_due = step % self._config.run.weights_every == 0
        self._advance(wait=is_due or event.is_last)
        if is_due:
            self._snapshot.take_weights()
            self._save.begin(step, self._snapshot, {"stage": self._config.stage.name})
            if event.is_last:
                self._advance(wait=True)

    def close(self) -> None:
        """Leave nothing running."""
        self._save.close()

    def _advance(self, *, wait: bool) -> None:
        if self._save.step is not None and (final := self._save.poll(wait=wait)):
            say(f"weights: {final}")

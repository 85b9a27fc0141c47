"""Validation loss every ``train.validate_every`` steps, on the same packs in any layout."""

from collections.abc import Mapping

from triptych.configs.schema import Config
from triptych.data.types import Step
from triptych.train.engine import Engine
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.step import validation_loss


class Validation(Hook):
    """Adds ``validation_loss`` to the step's metrics; on every rank."""

    def __init__(self, config: Config, engine: Engine, step: Step) -> None:
        self._every = config.train.validate_every
        self._engine, self._step = engine, step

    def measure(self, event: StepEvent) -> Mapping[str, float]:
        """Validate where it is time to, and at the last step."""
        if event.state.step % self._every and not event.is_last:
            return {}
        engine = self._engine
        return {"validation_loss": validation_loss(engine.chunks, self._step, engine.mesh)}

"""Validation loss every ``train.validate_every`` steps, on the same packs in any layout."""

from triptych.configs.schema import Config
from triptych.data.types import Step
from triptych.train.engine import Engine
from triptych.train.hooks.hook import StepEvent
from triptych.train.step import validation_loss


class Validation:
    """On every rank.

    Adds ``validation_loss`` to the step's metrics, so it runs before whoever writes them.
    """

    def __init__(self, config: Config, engine: Engine, step: Step) -> None:
        self._every = config.train.validate_every
        self._engine, self._step = engine, step

    def after_step(self, event: StepEvent) -> None:
        """Validate where it is time to, and at the last step."""
        if event.state.step % self._every == 0 or event.is_last:
            engine = self._engine
            loss = validation_loss(engine.chunks, self._step, engine.mesh)
            event.metrics["validation_loss"] = loss

    def close(self) -> None:
        """Nothing to close."""

"""Validation loss every ``train.validate_every`` steps, on the same packs each time, in any layout."""

from collections.abc import Sequence

from triptych.configs.schema import Config
from triptych.data.types import Batch
from triptych.train.engine import Engine
from triptych.train.hooks.hook import StepEvent
from triptych.train.step import validation_loss


class Validation:
    """On every rank; adds ``validation_loss`` to the step's metrics, so it runs before whoever writes them."""

    def __init__(self, config: Config, engine: Engine, batches: Sequence[Batch]) -> None:
        self._every = config.train.validate_every
        self._engine, self._batches = engine, batches

    def after_step(self, event: StepEvent) -> None:
        """Validate where it is time to, and at the last step."""
        if event.state.step % self._every == 0 or event.is_last:
            engine = self._engine
            loss = validation_loss(engine.model, self._batches, engine.mesh)
            event.metrics["validation_loss"] = loss

    def close(self) -> None:
        """Nothing to close."""

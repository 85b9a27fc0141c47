"""Validation loss every ``train.validate_every`` steps, on the same packs in any layout."""

from collections.abc import Mapping
from typing import Any

from triptych.configs.schema import Config
from triptych.data.batch import Step
from triptych.train.engine import Engine
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.step import validation_loss


class Validation(Hook):
    """Adds ``validation_loss`` and that of each source to the step's metrics; on every rank."""

    def __init__(self, config: Config, engine: Engine, step: Step) -> None:
        self._every = config.train.validate_every
        self._engine, self._step, self._sources = engine, step, list(config.data.validation)

    def measure(self, event: StepEvent) -> Mapping[str, Any]:
        """Validate where it is time to, and at the last step."""
        if event.state.step % self._every and not event.is_last:
            return {}
        engine = self._engine
        loss, by_source = validation_loss(engine.chunks, self._step, engine.mesh)
        named = dict(zip(self._sources, by_source, strict=True))
        return {"validation_loss": loss, "validation_loss_by_source": named}

"""What a hook is, and what it is told."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from triptych.data.types import Step
from triptych.train.state import TrainState
from triptych.train.step import StepResult


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One finished step.

    Hooks run in order, on every rank; ``metrics`` grows on its way through them.
    """

    state: TrainState
    """After the step."""
    result: StepResult
    step: Step
    """This rank's data."""
    is_last: bool
    """Budget or cap is reached."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """What ``metrics.jsonl`` and the trackers get."""


class Hook(Protocol):
    """Called after each step on every rank."""

    def after_step(self, event: StepEvent) -> None:
        """One step is done."""

    def close(self) -> None:
        """Training ends, also by an error."""

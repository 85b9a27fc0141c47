"""What a hook is, and what it is told."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from triptych.data.batch import Step
from triptych.train.state import TrainState
from triptych.train.step import StepResult
from triptych.train.stop import StopReason


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One finished step, the same for every hook."""

    state: TrainState
    """The run's place after the step."""
    result: StepResult
    step: Step
    """This rank's data."""
    is_last: bool
    """Whether the run ends here: budget or cap is reached, or all ranks stop."""
    metrics: Mapping[str, Any]
    """What ``metrics.jsonl`` and the trackers get; read-only."""

    def __post_init__(self) -> None:
        """Keep a copy of the metrics that nobody can write to."""
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))


class Hook:
    """Something optional around the loop. A subclass implements what it needs, all else is nothing.

    Hooks are called in order, on every rank that has them; ``close`` in reverse. ``on_error`` and
    ``close`` must not call a collective: after an error the other ranks may never come.
    """

    @property
    def kind(self) -> str:
        """What people know it by."""
        return type(self).__name__

    def on_start(self, state: TrainState) -> None:
        """The first step after ``state`` is about to begin."""

    def before_step(self, state: TrainState) -> None:
        """The step after ``state`` is about to begin."""

    def asks_to_save(self) -> bool:
        """Whether the run is to be saved after the step that is about to begin."""
        return False

    def measure(self, event: StepEvent) -> Mapping[str, Any]:
        """More metrics of the step, which ``after_step`` of every hook is then told."""
        return {}

    def after_step(self, event: StepEvent) -> StopReason | None:
        """One step is done. A reason asks for the run to end; the next step is the last then."""

    def on_error(self, error: BaseException) -> None:
        """Training ends by this error, which is raised again once all hooks are closed."""

    def close(self) -> None:
        """Training has ended, also by an error."""

"""Where a run stands.

A few numbers, all that is needed to go on besides weights and optimizer state.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from triptych.data.plan.order import Cursor


@dataclass(frozen=True, slots=True)
class PlanSpan:
    """From ``step`` on, the data followed this plan."""

    step: int
    plan: str
    """Its hash."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """After ``step`` steps."""

    step: int
    consumed_tokens: int
    """LLM tokens, padding not counted."""
    consumed_samples: int
    cursor: Cursor
    """The next pack."""
    segments: tuple[PlanSpan, ...]
    """The plans that the run has followed; more than one only where a changed plan was accepted."""
    num_unreadable: int = 0
    """Of ``consumed_samples``, those whose media could not be read; not counted by old versions."""
    unreadable_in_a_row: int = 0
    """Samples of the last steps, if of these no sample that has media could be read."""

    def after(
        self,
        *,
        num_tokens: int,
        num_samples: int,
        num_with_media: int,
        num_unreadable: int,
        cursor: Cursor,
    ) -> "TrainState":
        """One step later."""
        none_readable = num_unreadable == num_with_media
        return replace(
            self,
            step=self.step + 1,
            consumed_tokens=self.consumed_tokens + num_tokens,
            consumed_samples=self.consumed_samples + num_samples,
            num_unreadable=self.num_unreadable + num_unreadable,
            unreadable_in_a_row=(self.unreadable_in_a_row + num_unreadable) * none_readable,
            cursor=cursor,
        )

    def on_new_plan(self, plan: str, cursor: Cursor) -> "TrainState":
        """The same place, its data started anew from another plan."""
        segments = (*self.segments, PlanSpan(step=self.step, plan=plan))
        return replace(self, cursor=cursor, segments=segments)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {**asdict(self), "cursor": self.cursor.to_json()}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "TrainState":
        """The state that ``to_json`` described."""
        segments = tuple(PlanSpan(**segment) for segment in state["segments"])
        cursor = Cursor.from_json(state["cursor"])
        return cls(**{**state, "cursor": cursor, "segments": segments})

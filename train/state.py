"""Where a run stands: a few numbers, all that is needed to go on besides weights and optimizer state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from triptych.data.plan.plan import Cursor


@dataclass(frozen=True, slots=True)
class TrainState:
    """After ``step`` steps."""

    step: int
    consumed_tokens: int
    """LLM tokens, padding not counted."""
    consumed_samples: int
    cursor: Cursor
    """The next pack."""

    def after(self, *, num_tokens: int, num_samples: int, cursor: Cursor) -> "TrainState":
        """One step later."""
        return replace(
            self,
            step=self.step + 1,
            consumed_tokens=self.consumed_tokens + num_tokens,
            consumed_samples=self.consumed_samples + num_samples,
            cursor=cursor,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {**asdict(self), "cursor": self.cursor.to_json()}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "TrainState":
        """The state that ``to_json`` described."""
        return cls(**{**state, "cursor": Cursor.from_json(state["cursor"])})

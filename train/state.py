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
class PassedOver:
    """Packs that no weights have learned from, as the run went back to before them."""

    step: int
    """That the run went back to."""
    first_pack: int
    end_pack: int
    """The first one after them."""


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
    num_skipped: int = 0
    """Of ``step``, those that updated nothing because of a veto."""
    skipped_in_a_row: int = 0
    """Of the last steps that had a loss."""
    recent_losses: tuple[float, ...] = ()
    """Of the last steps that updated; ``train.spikes.window`` of them at most."""
    passed_over: tuple[PassedOver, ...] = ()

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

    def judged(self, loss: float | None, *, is_skipped: bool, window: int) -> "TrainState":
        """The same place, once it is known whether its step updated, at which loss if any."""
        if is_skipped:
            return replace(
                self,
                num_skipped=self.num_skipped + 1,
                skipped_in_a_row=self.skipped_in_a_row + 1,
            )
        if loss is None:
            return self
        recent = (*self.recent_losses, loss)[-window:]
        return replace(self, skipped_in_a_row=0, recent_losses=recent)

    def passing_over(self, now: "TrainState") -> "TrainState":
        """This place of before, with the data until ``now`` passed over."""
        packs = PassedOver(self.step, self.cursor.num_packs, now.cursor.num_packs)
        return replace(self, cursor=now.cursor, passed_over=(*now.passed_over, packs))

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
        values = {
            **state,
            "segments": tuple(PlanSpan(**segment) for segment in state["segments"]),
            "cursor": Cursor.from_json(state["cursor"]),
            "recent_losses": tuple(state.get("recent_losses", ())),
            "passed_over": tuple(PassedOver(**packs) for packs in state.get("passed_over", ())),
        }
        return cls(**values)

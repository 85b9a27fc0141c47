"""How a run ends early, as any rank may ask, or goes back: all ranks after the same step."""

from dataclasses import dataclass

from triptych.parallel.agree import Ranks
from triptych.train.state import TrainState


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a hook asks for the run to end."""

    text: str
    """For people, as "Slurm ends the job in two minutes"."""
    requeue: bool = False
    """Whether the run shall be started again, by itself."""
    is_error: bool = False
    """Whether the run has failed. All ranks must ask alike then."""


class GoBackError(Exception):
    """Training is to go on from the newest proven checkpoint.

    Raised on every rank after the same step; a run catches it.
    """

    def __init__(self, state: TrainState, *, passes_over: bool) -> None:
        super().__init__(f"the run goes back from step {state.step}")
        self.state = state
        """Where it was."""
        self.passes_over = passes_over
        """Whether the data since then are passed over, or trained on again."""


def gather_reasons(ranks: Ranks, own: StopReason | None) -> list[tuple[int, StopReason]]:
    """Which ranks asked, and why, for all to know. Every rank must call this, once all stopped."""
    reasons: list[StopReason | None] = ranks.all_gather(own)
    return [(rank, reason) for rank, reason in enumerate(reasons) if reason]

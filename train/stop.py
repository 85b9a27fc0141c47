"""How a run ends before its budget is used up: any rank may ask, all stop after the same step."""

from dataclasses import dataclass

from triptych.parallel.agree import Ranks


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a hook asks for the run to end."""

    text: str
    """For people, as "Slurm ends the job in two minutes"."""
    requeue: bool = False
    """Whether the run shall be started again, by itself."""
    is_error: bool = False
    """Whether the run has failed. All ranks must ask alike then."""


def gather_reasons(ranks: Ranks, own: StopReason | None) -> list[tuple[int, StopReason]]:
    """Which ranks asked, and why, for all to know. Every rank must call this, once all stopped."""
    reasons: list[StopReason | None] = ranks.all_gather(own)
    return [(rank, reason) for rank, reason in enumerate(reasons) if reason]

"""How a run ends before its budget is used up: any rank may ask, all stop after the same step."""

from dataclasses import dataclass

from triptych.parallel.agree import Ranks


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a hook asks for the run to end."""

    text: str
    """For people, as "Slurm ends the job in two minutes"."""


def gather_reasons(ranks: Ranks, own: StopReason | None) -> str:
    """Who asked, and why, for all to know. Every rank must call this, once they have stopped."""
    reasons: list[StopReason | None] = ranks.all_gather(own)
    told = [f"rank {rank}: {reason.text}" for rank, reason in enumerate(reasons) if reason]
    return "; ".join(told)

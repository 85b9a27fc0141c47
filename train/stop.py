"""How a run ends before its budget is used up: any rank may ask, all stop after the same step."""

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class StopReason:
    """Why a hook asks for the run to end."""

    text: str
    """For people, as "Slurm ends the job in two minutes"."""


def gather_reasons(own: StopReason | None) -> str:
    """Who asked, and why, as all ranks know it then. Every rank must call this, once they stop."""
    reasons: list[StopReason | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, own)
    told = [f"rank {rank}: {reason.text}" for rank, reason in enumerate(reasons) if reason]
    return "; ".join(told)

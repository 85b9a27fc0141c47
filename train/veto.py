"""A step whose numbers went wrong: nothing is updated, on any rank, and the data are named.

Every rank must decide alike, also where a flipped bit shows on one rank alone. So the wish of each
travels in the all-reduce of the gradient norm, and what comes out of that decides, for all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from triptych.data.batch import Batch, Step
from triptych.data.types import SampleId
from triptych.parallel.mesh import Mesh


class VetoCause(Enum):
    """Why nothing was updated."""

    not_finite = "not finite"
    """A loss or a gradient is no number, or infinite."""
    spike = "a spike"
    """The loss is finite, and too high."""


@dataclass(frozen=True, slots=True)
class Veto:
    """Why a step updated nothing, and what it may be due to; the same on every rank."""

    cause: VetoCause
    ranks: tuple[int, ...]
    """Those whose own loss is not finite. None of them where a gradient alone is not."""
    packs: tuple[int, ...]
    """Numbers, in order: of the microbatches whose loss is not finite, else all of the step."""
    samples: tuple[SampleId, ...]
    """Theirs."""

    def __str__(self) -> str:
        if self.cause is VetoCause.spike:
            return "the loss is a spike"
        if not self.ranks:
            return "a gradient, but no loss, is not finite"
        return f"the loss of rank {', '.join(map(str, self.ranks))} is not finite"


def find_veto(step: Step, losses: Tensor, *, is_spike: bool, mesh: Mesh) -> Veto:
    """Gather what every rank knows. Every rank must call this.

    Args:
        step: of this rank.
        losses: (num_microbatches,) sums of this rank, or (0,) where it is not on the last stage.
        is_spike: whether this rank sees nothing that is not finite.
        mesh: this rank's place.
    """
    numbers = [n for n, is_finite in enumerate(losses.isfinite().tolist()) if not is_finite]
    wrong = _packs_and_samples(step, numbers)
    everything = _packs_and_samples(step, range(len(step.microbatches)))
    everyone = mesh.world.all_gather((bool(numbers), is_spike, wrong, everything))
    ranks = tuple(rank for rank, (is_here, *_) in enumerate(everyone) if is_here)
    shares = [wrong if ranks else everything for *_, wrong, everything in everyone]
    all_see_a_spike = not ranks and all(sees_it for _, sees_it, *_ in everyone)
    return Veto(
        cause=VetoCause.spike if all_see_a_spike else VetoCause.not_finite,
        ranks=ranks,
        packs=tuple(sorted({pack for packs, _ in shares for pack in packs})),
        samples=tuple(sorted({sample for _, samples in shares for sample in samples})),
    )


def _packs_and_samples(step: Step, microbatches: Iterable[int]) -> tuple[list[int], list[SampleId]]:
    numbers = list(microbatches)
    size = len(step.packs) // max(1, len(step.microbatches))
    packs = [pack for n in numbers for pack in step.packs[n * size : (n + 1) * size]]
    batches: Sequence[Batch] = [step.microbatches[n] for n in numbers]
    return packs, [sample for batch in batches for sample in batch.sample_ids]

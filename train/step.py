"""One optimizer step.

The summed loss of the global batch, divided by its number of supervised tokens, in every layout.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.costs.flops import NO_WORK, Workload
from triptych.data.types import Batch, MediaWork, Step, UnreadableSample
from triptych.errors import TrainingError
from triptych.models.feed import on_device
from triptych.parallel.agree import ranks_where
from triptych.parallel.mesh import Mesh
from triptych.parallel.schedule import LossFunction, run_microbatches
from triptych.train.engine import Engine


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over the global batch."""

    workload: Workload
    """What the FLOPs of the step follow from."""
    num_samples: int
    num_unreadable: int
    """Samples whose media could not be read."""
    num_with_media: int
    """Samples that have media, readable or not."""
    media_work: MediaWork
    num_asking_to_stop: int
    """Ranks that ask for the run to end after this step."""

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that the loss is the mean over."""
        number = self.workload.num_supervised_tokens
        assert number is not None, "batches count them"
        return number


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did, over all ranks."""

    loss: float | None
    """Mean over the supervised tokens of the global batch.

    None where there was none and nothing was updated.
    """
    grad_norm: float
    """Before clipping."""
    lr: dict[str, float]
    totals: Totals


def train_step(
    engine: Engine, step: Step, lr: dict[str, float], *, number: int, asks_to_stop: bool = False
) -> StepResult:
    """Forward, backward, update. Every rank must call this.

    Args:
        engine: model and optimizer.
        step: this data-parallel rank's microbatches.
        lr: by part.
        number: of the step, for messages.
        asks_to_stop: whether this rank asks for the run to end after this step.

    Raises:
        TrainingError: loss or gradient is not finite; on every rank, before anything is updated.
    """
    mesh, optimizer = engine.mesh, engine.optimizer
    totals = count(step, mesh, asks_to_stop=asks_to_stop)
    if totals.num_supervised_tokens == 0:
        return StepResult(None, 0.0, lr, totals)
    optimizer.zero_grad()
    loss_sum = sum_losses(engine.chunks, step.microbatches, mesh, forward_only=False)
    total_loss = _over_ranks(loss_sum, mesh)
    # The step's one wait for the device.
    loss, grad_norm = torch.stack([total_loss, optimizer.squared_grad_norm()]).tolist()
    loss, grad_norm = loss / totals.num_supervised_tokens, grad_norm**0.5
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        _stop(number, loss, grad_norm, loss_sum, mesh)
    optimizer.step(lr, grad_norm)
    return StepResult(loss, grad_norm, lr, totals)


def validation_loss(chunks: Sequence[nn.Module], step: Step, mesh: Mesh) -> float:
    """Mean loss over the supervised tokens of all ranks' batches. Every rank must call this."""
    totals = count(step, mesh)
    with torch.no_grad():
        loss_sum = sum_losses(chunks, step.microbatches, mesh, forward_only=True)
    return float(_over_ranks(loss_sum, mesh)) / max(1, totals.num_supervised_tokens)


def sum_losses(
    chunks: Sequence[nn.Module], batches: Sequence[Batch], mesh: Mesh, *, forward_only: bool
) -> Tensor:
    """Loss of this rank's supervised tokens, summed in fp64.

    0 but on the last stage. Every rank must call this.
    """

    def forward(chunk: nn.Module, batch: Batch) -> tuple[Tensor, LossFunction[Tensor]]:
        return chunk(batch), lambda loss_sum: counted(loss_sum, batch.num_supervised_tokens)

    lengths = [len(batch.input_ids) for batch in batches]
    feeds = [on_device(batches, mesh, place) for place in mesh.places(len(chunks))]
    sums = run_microbatches(chunks, feeds, lengths, forward, mesh, forward_only=forward_only)
    zero = torch.zeros((), dtype=torch.float64, device=mesh.device)
    return torch.stack(sums).sum() if sums else zero


def counted(loss_sum: Tensor, num_supervised_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """What megatron-core's schedule wants of the last stage.

    Args:
        loss_sum: 0-d float64, over the supervised tokens.
        num_supervised_tokens: of the microbatch.

    Returns:
        The sum to differentiate, the number as a 0-d int32 tensor, and the sum to report. The
        schedule turns the gradients of all sums into the gradient of the mean over the global
        batch (parallel/schedule.py).
    """
    return loss_sum, torch.tensor(num_supervised_tokens, dtype=torch.int32), loss_sum.detach()


def count(step: Step, mesh: Mesh, *, asks_to_stop: bool = False) -> Totals:
    """Add up the batches of all replicas, without the samples that could not be read.

    Only the reading rank of a replica knows of those, so it counts for the others, and tells them
    which to leave out of their loss where there are any. Every rank must call this.
    """
    drop_unreadable(step, step.unreadable)
    workload = sum((batch.workload for batch in step.microbatches), NO_WORK)
    num_samples = sum(len(batch.sample_ids) for batch in step.microbatches)
    num_with_media = sum(batch.num_with_media for batch in step.microbatches)
    counts = [*astuple(workload), num_samples, len(step.unreadable), num_with_media]
    if not mesh.reads_media:
        counts = [0] * len(counts)
    totals = mesh.world.add_up([*counts, *astuple(step.media_work), asks_to_stop])
    *loads, num_samples, num_unreadable, num_with_media = totals[: len(counts)]
    *work, num_asking = totals[len(counts) :]
    if num_unreadable:
        drop_unreadable(step, mesh.world.all_gather(step.unreadable)[mesh.media_reader])
    return Totals(
        Workload(*loads),
        num_samples,
        num_unreadable,
        num_with_media,
        MediaWork(*work),
        num_asking,
    )


def drop_unreadable(step: Step, unreadable: Iterable[UnreadableSample]) -> None:
    """Take samples whose media could not be read out of the loss of this rank."""
    for sample in unreadable:
        batch = step.microbatches[sample.microbatch]
        batch.leave_out(*batch.segments[sample.segment : sample.segment + 2])


def _over_ranks(loss_sum: Tensor, mesh: Mesh) -> Tensor:
    """The sum over all ranks, on every rank.

    The last stage's sums over dp, then from the last stage to the others.
    """
    total = loss_sum.clone()
    dist.all_reduce(total, group=mesh.dp_group)
    dist.all_reduce(total, group=mesh.pp_group)
    return total


def _stop(number: int, loss: float, grad_norm: float, loss_sum: Tensor, mesh: Mesh) -> None:
    """Name the ranks whose own loss is not finite, and stop all."""
    ranks = ranks_where(mesh.world, not math.isfinite(float(loss_sum)))
    where = (
        f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "a gradient, but no loss,"
    )
    raise TrainingError(
        f"step {number}: {where} is not finite (loss {loss}, gradient norm {grad_norm}); "
        "nothing was updated  -> run.dir/ledger names the packs of each step; resume from an "
        "earlier checkpoint, with a lower learning rate or without the data at fault"
    )

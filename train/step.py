"""One optimizer step.

The summed loss of the global batch, divided by its number of supervised tokens, in every layout.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.costs.flops import NO_WORK, Workload
from triptych.data.batch import Batch, MediaWork, Step, UnreadableSample
from triptych.models.feed import on_device
from triptych.parallel.mesh import Mesh
from triptych.parallel.schedule import LossFunction, run_microbatches
from triptych.train.engine import Engine
from triptych.train.veto import Veto, VetoCause, find_veto


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
    num_asking_to_save: int = 0
    """Ranks that ask for it to be saved after this step."""
    samples_by_source: Sequence[int] = ()
    """In the order of the plan, unreadable ones included."""
    tokens_by_source: Sequence[int] = ()
    """LLM tokens, so counted."""
    supervised_by_source: Sequence[int] = ()
    """Of those, the ones that count in the loss."""

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

    None where there was none and nothing was updated, or where it is not finite.
    """
    grad_norm: float | None
    """Before clipping; None where nothing was updated because of a veto."""
    lr: dict[str, float]
    totals: Totals
    loss_limit: float = math.inf
    """From which on a loss is a spike."""
    veto: Veto | None = None
    """Why nothing was updated."""

    @property
    def is_spike(self) -> bool:
        """Whether the loss is finite, and too high."""
        if self.veto is not None:
            return self.veto.cause is VetoCause.spike
        return self.loss is not None and self.loss >= self.loss_limit

    @property
    def is_sound(self) -> bool:
        """Whether there is a loss, and nothing is wrong with it."""
        return self.loss is not None and self.veto is None and not self.is_spike


def train_step(
    engine: Engine,
    step: Step,
    lr: dict[str, float],
    *,
    loss_limit: float = math.inf,
    vetoes_spikes: bool = False,
    asks_to_stop: bool = False,
    asks_to_save: bool = False,
) -> StepResult:
    """Forward, backward, and update unless a number is wrong. Every rank must call this.

    Args:
        engine: model and optimizer.
        step: this data-parallel rank's microbatches.
        lr: by part.
        loss_limit: from which on a loss is a spike.
        vetoes_spikes: whether a spike updates nothing; a loss or gradient that is not finite never
            does.
        asks_to_stop: whether this rank asks for the run to end after this step.
        asks_to_save: whether it asks for the run to be saved then.
    """
    mesh, optimizer = engine.mesh, engine.optimizer
    totals = count(step, mesh, asks_to_stop=asks_to_stop, asks_to_save=asks_to_save)
    if totals.num_supervised_tokens == 0:
        return StepResult(None, 0.0, lr, totals)
    optimizer.zero_grad()
    losses = microbatch_losses(engine.chunks, step.microbatches, mesh, forward_only=False)
    total_loss = over_ranks(losses.sum(), mesh)
    most = (loss_limit if vetoes_spikes else math.inf) * totals.num_supervised_tokens
    squared_norm = optimizer.squared_grad_norm(veto=~(total_loss < most))
    # The step's one wait for the device.
    loss, squared_norm = torch.stack([total_loss, squared_norm]).tolist()
    loss /= totals.num_supervised_tokens
    if math.isfinite(squared_norm):
        optimizer.step(lr, squared_norm**0.5)
        return StepResult(loss, squared_norm**0.5, lr, totals, loss_limit)
    is_spike = math.isfinite(loss) and squared_norm == -math.inf
    veto = find_veto(step, losses, is_spike=is_spike, mesh=mesh)
    told_loss = loss if math.isfinite(loss) else None
    return StepResult(told_loss, None, lr, totals, loss_limit, veto)


def microbatch_losses(
    chunks: Sequence[nn.Module], batches: Sequence[Batch], mesh: Mesh, *, forward_only: bool
) -> Tensor:
    """(num_microbatches,) float64: the loss of each, summed over its supervised tokens.

    (0,) but on the last stage. Every rank must call this.
    """

    def forward(chunk: nn.Module, batch: Batch) -> tuple[Tensor, LossFunction[Tensor]]:
        return chunk(batch), lambda loss_sum: counted(loss_sum, batch.num_supervised_tokens)

    sums = run_forward(chunks, batches, mesh, forward, forward_only=forward_only)
    none = torch.zeros(0, dtype=torch.float64, device=mesh.device)
    return torch.stack(sums) if sums else none


def run_forward(
    chunks: Sequence[nn.Module],
    batches: Sequence[Batch],
    mesh: Mesh,
    forward: Callable[[nn.Module, Batch], tuple[Tensor, LossFunction[Tensor]]],
    *,
    forward_only: bool,
) -> list[Tensor]:
    """What ``forward`` reports of each microbatch; nothing but on the last stage.

    Backward follows it but where ``forward_only``. Every rank must call this.
    """
    lengths = [len(batch.input_ids) for batch in batches]
    feeds = [on_device(batches, mesh, place) for place in mesh.places(len(chunks))]
    return run_microbatches(chunks, feeds, lengths, forward, mesh, forward_only=forward_only)


def counted(
    loss_sum: Tensor, num_supervised_tokens: int, report: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What megatron-core's schedule wants of the last stage.

    Args:
        loss_sum: 0-d float64, over the supervised tokens.
        num_supervised_tokens: of the microbatch.
        report: None for the sum.

    Returns:
        The sum to differentiate, the number as a 0-d int32 tensor, and the sum to report. The
        schedule turns the gradients of all sums into the gradient of the mean over the global
        batch (parallel/schedule.py).
    """
    num_tokens = torch.tensor(num_supervised_tokens, dtype=torch.int32)
    return loss_sum, num_tokens, loss_sum.detach() if report is None else report


def count(
    step: Step, mesh: Mesh, *, asks_to_stop: bool = False, asks_to_save: bool = False
) -> Totals:
    """Add up the batches of all replicas, without the samples that could not be read.

    Only the reading rank of a replica knows of those, so it counts for the others, and tells them
    which to leave out of their loss where there are any. Every rank must call this.
    """
    drop_unreadable(step, step.unreadable)
    workload = sum((batch.workload for batch in step.microbatches), NO_WORK)
    num_samples = sum(len(batch.sample_ids) for batch in step.microbatches)
    num_with_media = sum(batch.num_with_media for batch in step.microbatches)
    by_source = np.zeros((3, step.num_sources), dtype=np.int64)
    for batch in step.microbatches:
        by_source += batch.by_source(step.num_sources)
    counts = [
        *by_source.ravel().tolist(),
        *astuple(workload),
        num_samples,
        len(step.unreadable),
        num_with_media,
    ]
    if not mesh.reads_media:
        counts = [0] * len(counts)
    totals = mesh.world.add_up([*counts, *astuple(step.media_work), asks_to_stop, asks_to_save])
    *loads, num_samples, num_unreadable, num_with_media = totals[by_source.size : len(counts)]
    *work, num_asking_to_stop, num_asking_to_save = totals[len(counts) :]
    if num_unreadable:
        drop_unreadable(step, mesh.world.all_gather(step.unreadable)[mesh.media_reader])
    return Totals(
        Workload(*loads),
        num_samples,
        num_unreadable,
        num_with_media,
        MediaWork(*work),
        num_asking_to_stop,
        num_asking_to_save,
        *np.reshape(totals[: by_source.size], by_source.shape).tolist(),
    )


def drop_unreadable(step: Step, unreadable: Iterable[UnreadableSample]) -> None:
    """Take samples whose media could not be read out of the loss of this rank."""
    for sample in unreadable:
        batch = step.microbatches[sample.microbatch]
        batch.leave_out(*batch.segments[sample.segment : sample.segment + 2])


def over_ranks(loss_sum: Tensor, mesh: Mesh) -> Tensor:
    """The sum over all ranks, on every rank, of any shape. Every rank must call this.

    The last stage's sums over dp, then from the last stage to the others.
    """
    total = loss_sum.clone()
    dist.all_reduce(total, group=mesh.dp_group)
    dist.all_reduce(total, group=mesh.pp_group)
    return total

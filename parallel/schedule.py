"""One step's microbatches through megatron-core's schedule.

Plain accumulation, 1F1B, or interleaved 1F1B where a stage holds several chunks of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from triptych.parallel.mesh import Mesh
from triptych.parallel.p2p import PlannedP2P

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

Microbatch = TypeVar("Microbatch")
Result = TypeVar("Result")
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Result]]


def run_microbatches(
    chunks: Sequence[nn.Module],
    feeds: Sequence[Iterator[Microbatch]],
    lengths: Sequence[int],
    forward: Callable[[nn.Module, Microbatch], tuple[Tensor, LossFunction[Result] | None]],
    mesh: Mesh,
    *,
    forward_only: bool,
) -> list[Result]:
    """Forward, and backward, of every microbatch.

    Gradients are summed and divided by the global number of tokens that count.
    Every rank must call this, with the same number of microbatches.

    Args:
        chunks: of the model on this stage, wrapped for data parallelism, or bare for
            ``forward_only``.
        feeds: of each chunk, this data-parallel rank's microbatches.
        lengths: tokens of each, padding included; the same on all stages.
        forward: runs a chunk and returns its output and, used of the whole model's last only, what
            turns the output into (summed loss, number of tokens that count as a 0-d int tensor,
            result to keep); None, for ``forward_only``, keeps the output.
        mesh: this rank's place.
        forward_only: no backward pass and no gradient reduction.

    Returns:
        The results of the microbatches on the last stage, in order; an empty list elsewhere.
    """
    config: Any = get_model_config(chunks[0])
    shard = mesh.dims.tp if config.sequence_parallel else 1
    shapes = [[length // shard, 1, config.hidden_size] for length in lengths]

    def forward_step(data: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        return forward(chunk, next(data))

    with _nothing_left_open(config, forward_only):
        results: list[Result] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=list(feeds),
            model=list(chunks),
            num_microbatches=len(lengths),
            seq_length=1,  # not used: every microbatch has its own length
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=PlannedP2P(mesh.pp_group, config, shapes, len(chunks)),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    return results


@contextmanager
def _nothing_left_open(config: Any, forward_only: bool) -> Iterator[None]:
    """Without a backward pass, megatron-core does not finish what it begins in two places.

    It does not wait for the last message that it overlaps, which would be lost, and the next stage
    hang; and it does not leave the context in which gradients are not reduced yet.
    """
    overlaps, no_sync = config.overlap_p2p_comm_warmup_flush, config.no_sync_func
    if forward_only:
        config.overlap_p2p_comm_warmup_flush, config.no_sync_func = False, None
    try:
        yield
    finally:
        config.overlap_p2p_comm_warmup_flush, config.no_sync_func = overlaps, no_sync

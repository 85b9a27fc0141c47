"""One step's microbatches through megatron-core's schedule: 1F1B, or plain accumulation."""

from collections.abc import Callable, Iterator, Sequence
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
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    lengths: Sequence[int],
    forward: Callable[[nn.Module, Microbatch], tuple[Tensor, LossFunction[Result]]],
    mesh: Mesh,
    *,
    forward_only: bool,
) -> list[Result]:
    """Forward, and backward, of every microbatch.

    Gradients are summed and divided by the global number of tokens that count.
    Every rank must call this, with the same number of microbatches.

    Args:
        model: wrapped for data parallelism, or bare for ``forward_only``.
        microbatches: this data-parallel rank's.
        lengths: tokens of each, padding included; the same on all stages.
        forward: runs this stage and returns its output and, used on the last stage only, what turns
            the output into (summed loss, number of tokens that count as a 0-d int tensor, result to
            keep).
        mesh: this rank's place.
        forward_only: no backward pass and no gradient reduction.

    Returns:
        The results of the microbatches on the last stage, in order; an empty list elsewhere.
    """
    config: Any = get_model_config(model)
    shard = mesh.dims.tp if config.sequence_parallel else 1
    shapes = [[length // shard, 1, config.hidden_size] for length in lengths]

    def forward_step(data: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        return forward(chunk, next(data))

    results: list[Result] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=model,
        num_microbatches=len(microbatches),
        seq_length=1,  # not used: every microbatch has its own length
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=PlannedP2P(mesh.pp_group, config, shapes),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return results

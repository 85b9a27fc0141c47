"""The model's chunks wrapped for data parallelism by megatron-core's DistributedDataParallel.

It accumulates gradients over the microbatches in fp32 buffers. Who sums them over the data-parallel
ranks is a matter of ZeRO's: megatron-core's optimizer lets the wrapping do it, overlapped with the
backward pass if asked; DeepSpeed does it itself, afterwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from triptych.configs.schema import OverlapConfig, Zero

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True, slots=True)
class DataParallelModel:
    """This rank's chunks of the model, wrapped, and their parameters."""

    chunks: Sequence[DistributedDataParallel]
    parameters: Mapping[str, nn.Parameter]
    """By global name; what is frozen when the model is wrapped stays frozen."""
    parts: Mapping[str, str]
    """The part of each name; each part has its own learning rate."""

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by global name."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()


def wrap_chunks(
    chunks: Sequence[nn.Module],
    zero: Zero,
    overlap: OverlapConfig,
    *,
    sums_in_product: bool = False,
) -> list[DistributedDataParallel]:
    """Wrap the chunks of this rank, and tell megatron-core's schedule when to reduce gradients.

    Every rank must call this, also one where nothing trains.

    Args:
        chunks: with ``requires_grad`` set.
        zero: who sums gradients over the data-parallel ranks.
        overlap: whether gradients and weights travel while something is computed.
        sums_in_product: whether linear layers add their weight gradients to the buffers within the
            matrix product, by apex's kernel.
    """
    if zero is Zero.deepspeed:
        assert not overlap.grad_reduce, "refused by configs.rules"
        assert not overlap.param_gather, "refused by configs.rules"
        wrapped = [_accumulating(chunk) for chunk in chunks]
    else:
        wrapped = [_reducing(chunk, overlap) for chunk in chunks]
    module: Any
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, "gradient_accumulation_fusion"):  # here: a bare model has no buffers
            module.gradient_accumulation_fusion = sums_in_product
    transformer: Any = wrapped[0].config  # megatron-core's schedule asks the first chunk's
    transformer.finalize_model_grads_func = _finish_gradients
    if overlap.grad_reduce:
        # a list is for several chunks only
        no_sync = [chunk.no_sync for chunk in wrapped]
        transformer.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def _finish_gradients(
    chunks: Sequence[DistributedDataParallel],
    num_tokens: Tensor,
    *,
    pg_collection: ProcessGroupCollection,
    **options: Any,
) -> None:
    """Sum the gradients over the ranks, and divide by the global number of tokens that count.

    megatron-core would divide too, but wait for the device to see whether the number is 0, which
    ``train_step`` has ruled out.

    Args:
        chunks: of this rank.
        num_tokens: of this dp rank, 0-d int32; 0 but on the last stage.
        pg_collection: megatron-core's groups.
        options: passed on.
    """
    finalize_model_grads(chunks, None, pg_collection=pg_collection, **options)
    for group in (pg_collection.pp, pg_collection.dp_cp):
        dist.all_reduce(num_tokens, group=group)
    for chunk in chunks:
        chunk.scale_gradients(1.0 / num_tokens)


def _reducing(chunk: nn.Module, overlap: OverlapConfig) -> DistributedDataParallel:
    """With gradients reduce-scattered over dp."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
    )
    transformer: Any = chunk.config
    return DistributedDataParallel(transformer, config, chunk)


def _accumulating(chunk: nn.Module) -> DistributedDataParallel:
    """Without a reduction over dp: its group is of one rank."""
    alone = ProcessGroupCollection.use_mpu_process_groups()
    one_rank = alone.cp  # as nothing is context-parallel
    alone.dp = alone.dp_cp = alone.intra_dp_cp = one_rank
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=False, overlap_grad_reduce=False
    )
    transformer: Any = chunk.config
    return DistributedDataParallel(transformer, config, chunk, pg_collection=alone)

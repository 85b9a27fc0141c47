"""Linear layers whose communication over tp runs beside their matrix products.

With sequence parallelism, megatron-core gathers the sequence before a column-parallel product, and
reduce-scatters it after a row-parallel one, while nothing is computed. Here both go by the pieces
of the ranks: one is multiplied while the next one travels. On CUDA torch's symmetric-memory kernels
do that ("asynchronous tensor parallelism", as in torchtitan), through NVLink; elsewhere the same
functions gather first and scatter last. No shape is fixed: packs vary in length.

T tokens or patches of a pack, t = T / tp of them on this rank; I inputs and O outputs here.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # noqa: F401  # registers torch.ops.symm_mem
from torch import Tensor

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class OverlappedColumnParallelLinear(ColumnParallelLinear):
    """Megatron-core's, with its forward all-gather beside the product; sequence-parallel only."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *, bias: Tensor | None, **_: Any) -> Any:
        product_T1O = _GatherMatmul.apply(  # type: ignore[no-untyped-call]  # torch has none
            input, weight, self.tp_group
        )
        return product_T1O if bias is None else product_T1O + bias


class OverlappedRowParallelLinear(RowParallelLinear):
    """Megatron-core's, with its reduce-scatter beside the product; sequence-parallel only."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, 1, I) -> (t, 1, O), and the bias where the caller adds it."""
        output_t1O = _MatmulScatter.apply(  # type: ignore[no-untyped-call]  # torch has none
            input_, self.weight, self.tp_group
        )
        if self.skip_bias_add or self.bias is None:
            return output_t1O, self.bias
        return output_t1O + self.bias, None


class _GatherMatmul(torch.autograd.Function):
    """gather(input) @ weight.T; keeps what its gradients need of the input's piece and weight."""

    @staticmethod
    def forward(ctx: Any, input_t1I: Tensor, weight_OI: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(input_t1I if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.group = group
        return gather_matmul(input_t1I, weight_OI.t(), group)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_T1O,) = grads
        input_t1I, weight_OI = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        grad_input = grad_weight = None
        if needs_weight:  # travels while the input's gradient is computed
            input_T1I, gathering = _gather(input_t1I, ctx.group)
        if needs_input:
            grad_input = matmul_scatter(grad_T1O, weight_OI, ctx.group)
        if needs_weight:
            gathering.wait()
            grad_weight = _weight_gradient(grad_T1O, input_T1I)
        return grad_input, grad_weight, None


class _MatmulScatter(torch.autograd.Function):
    """reduce_scatter(input @ weight.T); keeps what its gradients need of input and weight."""

    @staticmethod
    def forward(ctx: Any, input_T1I: Tensor, weight_OI: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(input_T1I if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.group = group
        return matmul_scatter(input_T1I, weight_OI.t(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_t1O,) = grads
        input_T1I, weight_OI = ctx.saved_tensors
        grad_T1O, grad_input = gather_matmul(grad_t1O, weight_OI, ctx.group)
        grad_weight = _weight_gradient(grad_T1O, input_T1I) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight, None


def gather_matmul(
    piece_t1A: Tensor, matrix_AB: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Gather the pieces along the first dimension. Every rank of ``group`` must call this.

    Returns:
        (T, 1, A), and its product with the matrix: (T, 1, B).
    """
    if _has_fused_kernels(piece_t1A):
        whole_T1A, (product_T1B,) = torch.ops.symm_mem.fused_all_gather_matmul(
            piece_t1A.contiguous(), [matrix_AB], 0, group.group_name
        )
        return whole_T1A, product_T1B
    whole_T1A, gathering = _gather(piece_t1A, group)
    gathering.wait()
    return whole_T1A, whole_T1A @ matrix_AB


def matmul_scatter(whole_T1A: Tensor, matrix_AB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the products of the ranks. Every rank of ``group`` must call this.

    Returns:
        (t, 1, B): this rank's piece of the sum, along the first dimension.
    """
    if _has_fused_kernels(whole_T1A):
        piece: Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(
            whole_T1A, matrix_AB, "sum", 0, group.group_name
        )
        return piece
    product_T1B = whole_T1A @ matrix_AB
    piece = product_T1B.new_empty(len(product_T1B) // group.size(), *product_T1B.shape[1:])
    dist.reduce_scatter_tensor(piece, product_T1B, group=group)
    return piece


def _has_fused_kernels(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _gather(piece: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """The whole, which has arrived once the work was waited for."""
    whole = piece.new_empty(len(piece) * group.size(), *piece.shape[1:])
    work = dist.all_gather_into_tensor(whole, piece.contiguous(), group=group, async_op=True)
    return whole, work


def _weight_gradient(grad_T1O: Tensor, input_T1I: Tensor) -> Tensor:
    return grad_T1O.flatten(0, 1).t() @ input_T1I.flatten(0, 1)

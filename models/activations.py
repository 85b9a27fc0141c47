"""SwiGLU and quick GELU that keep nothing but their input for the backward pass.

Written as a chain of torch's operations, SwiGLU would keep four tensors of the MLP's width and
quick GELU two. Each is two functions, value and gradient, which a device with a compiler for them
turns into one kernel each (models/kernels.py).

T rows, F width of the MLP on this tensor-parallel rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.transformer.transformer_config import TransformerConfig

QUICK_GELU_SLOPE = 1.702


class SwiGLU(nn.Module):
    """``silu(gate) * up``; megatron-core calls it between the MLP's two linear layers."""

    def __init__(self, config: TransformerConfig, *, compiled: bool = False) -> None:
        super().__init__()
        self.functions = _functions(_swiglu, _swiglu_grad, compiled)

    def forward(self, gate_up: Tensor) -> Tensor:
        """(T, 1, 2 F), the gate first, to (T, 1, F)."""
        return _apply(gate_up, self.functions)


def quick_gelu(*, compiled: bool = False) -> Callable[[Tensor], Tensor]:
    """``x * sigmoid(1.702 x)``, as in the ViT, of any shape."""
    return partial(_apply, functions=_functions(_quick_gelu, _quick_gelu_grad, compiled))


Functions = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""Value of an input; gradient of the input, from that of the value and the input."""


def _functions(
    value: Callable[[Tensor], Tensor], grad: Callable[[Tensor, Tensor], Tensor], compiled: bool
) -> Functions:
    if not compiled:
        return value, grad
    # every microbatch has its own number of rows
    return torch.compile(value, dynamic=True), torch.compile(grad, dynamic=True)


def _apply(x: Tensor, functions: Functions) -> Tensor:
    result: Tensor = _KeepsInput.apply(x, *functions)  # type: ignore[no-untyped-call]  # torch has none
    return result


class _KeepsInput(torch.autograd.Function):
    """A function of one tensor with a gradient that needs only that tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Any, grad: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.grad = grad
        result: Tensor = value(x)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        [grad_output], [x] = grad_outputs, ctx.saved_tensors
        return ctx.grad(grad_output, x), None, None


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_grad(grad_output: Tensor, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    grad = torch.empty_like(gate_up)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
    torch.mul(F.silu(gate), grad_output, out=grad_up)
    return grad


def _quick_gelu(x: Tensor) -> Tensor:
    return (QUICK_GELU_SLOPE * x).sigmoid_().mul_(x)


def _quick_gelu_grad(grad_output: Tensor, x: Tensor) -> Tensor:
    gate = (QUICK_GELU_SLOPE * x).sigmoid_()
    slope = (1 - gate).mul_(x).mul_(QUICK_GELU_SLOPE).add_(1)
    return slope.mul_(gate).mul_(grad_output)

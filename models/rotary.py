"""Rotary positions in three products and two sums, forward and backward.

megatron-core's chain of fourteen operations does the same and copies in between; where small models
train, that shows. Rounded as there: no number differs.

T tokens or patches of the pack, N heads of this tensor-parallel rank, D head_dim.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.core.transformer.attention import SelfAttention


class TurningSelfAttention(SelfAttention):
    """Megatron-core's self-attention, but for who turns queries and keys."""

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As megatron-core's; ``rotary_pos_emb`` are angles, (T, 1, 1, D) float32."""
        self._angles = rotary_pos_emb
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's; queries and keys come turned."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is None:
            return (query, key, *rest)
        return (turn(query, self._angles), turn(key, self._angles), *rest)


def turn(heads_T1ND: Tensor, angles_T11D: Tensor) -> Tensor:
    """Turn pairs of elements, half a head apart, by their angles; the same shape and dtype."""
    turned: Tensor = _Turn.apply(heads_T1ND, angles_T11D)  # type: ignore[no-untyped-call]  # torch has none
    return turned


class _Turn(torch.autograd.Function):
    """Keeps cosines and sines, (T, 1, 1, D) each; the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, angles: Tensor) -> Tensor:
        cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
        ctx.save_for_backward(cos, sin)
        turned = heads * cos
        (low, high), (sin_low, sin_high) = heads.chunk(2, -1), sin.chunk(2, -1)
        turned_low, turned_high = turned.chunk(2, -1)
        turned_low.sub_(high * sin_low)
        turned_high.add_(low * sin_high)
        return turned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        cos, sin = ctx.saved_tensors
        turned_back = grad * cos
        low, high = (grad * sin).chunk(2, -1)
        back_low, back_high = turned_back.chunk(2, -1)
        back_low.add_(high)
        back_high.sub_(low)
        return turned_back, None

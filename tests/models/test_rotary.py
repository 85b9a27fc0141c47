"""Our way of turning queries and keys gives megatron-core's bits."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from triptych.models.rotary import turn

from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (37, 3, 16), (130, 4, 48)])
def test_turning_equals_megatrons(
    dtype: torch.dtype, tokens: int, heads: int, head_dim: int
) -> None:
    torch.manual_seed(tokens)
    mixed = torch.randn(tokens, 1, heads, 3 * head_dim).to(dtype)
    angles = torch.rand(tokens, 1, 1, head_dim) * 1000
    direction = torch.randn(tokens, 1, heads, head_dim).to(dtype)

    def value_and_gradient(rotate: object) -> SimpleNamespace:
        leaf = mixed.clone().requires_grad_()
        turned = rotate(leaf[..., :head_dim], angles)  # type: ignore[operator]  # two functions
        turned.backward(direction)
        gradient: Tensor | None = leaf.grad
        return SimpleNamespace(turned=turned, gradient=gradient)

    ours, theirs = value_and_gradient(turn), value_and_gradient(_apply_rotary_pos_emb_bshd)
    assert torch.equal(ours.turned, theirs.turned)
    assert torch.equal(ours.gradient, theirs.gradient)

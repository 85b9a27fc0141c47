"""Attention per segment on a CPU is one node of the graph, with the bits of torch's own."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.data.partition import Partition
from triptych.models.attention import Segments, attention_per_segment


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("bounds", [[0, 1], [0, 7, 14, 21, 30], [0, 5, 6, 11, 16, 48]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_segment_by_segment(
    dtype: torch.dtype, bounds: list[int], kv_heads: int, causal: bool
) -> None:
    torch.manual_seed(len(bounds))
    mixed = torch.randn(bounds[-1], 4 + 2 * kv_heads, 16).to(dtype)
    direction = torch.randn(bounds[-1], 4, 16).to(dtype)

    def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = []
        for start, end in pairwise(bounds):
            heads = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            out = F.scaled_dot_product_attention(
                *heads, is_causal=causal, scale=0.3, enable_gqa=kv_heads != 4
            )
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        segments = Segments(Partition.of(bounds))
        return attention_per_segment(q, k, v, segments, causal, 0.3)

    results = []
    for attend in (ours, by_torch):
        leaf = mixed.clone().requires_grad_()
        out = attend(*leaf.split([4, kv_heads, kv_heads], dim=1))
        out.backward(direction)
        results.append((out, leaf.grad))
    (value, gradient), (expected, expected_gradient) = results
    assert torch.equal(value, expected)
    assert gradient is not None
    assert expected_gradient is not None
    assert torch.equal(gradient, expected_gradient)

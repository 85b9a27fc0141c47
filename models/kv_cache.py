"""Keys and values of prompts that are being continued: each new token attends to what is kept.

S segments, one new token each; N heads of this tensor-parallel rank, K of them key/value heads, D
head_dim.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValueCache:
    """Filled by the first forward pass, of whole prompts; the next ones are of one token each.

    Of all layers of this rank, whichever chunk of the model they are in. Segments beyond ``slots``
    are padding.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = slots
        """Which prompt each segment of the next forward pass is of. Set before each."""
        self._kept: dict[nn.Module, dict[int, tuple[Tensor, Tensor]]] = {}

    def has(self, layer: nn.Module) -> bool:
        """Whether the layer's prompts are in it."""
        return layer in self._kept

    def keep(self, layer: nn.Module, k_TKD: Tensor, v_TKD: Tensor, bounds: Sequence[int]) -> None:
        """Take a layer's keys and values of whole prompts; a copy, as the pack is freed."""
        pieces = zip(self.slots, pairwise(bounds), strict=False)
        self._kept[layer] = {
            slot: (k_TKD[start:end].clone(), v_TKD[start:end].clone())
            for slot, (start, end) in pieces
        }

    def attend(
        self, layer: nn.Module, q_SND: Tensor, k_SKD: Tensor, v_SKD: Tensor, scale: float
    ) -> Tensor:
        """Attend with each segment's new token to all of its tokens; (S, N, D), 0 for padding."""
        kept, out_SND = self._kept[layer], torch.zeros_like(q_SND)
        for i, slot in enumerate(self.slots):
            before = kept[slot]
            k, v = (
                torch.cat([old, new[i : i + 1]])
                for old, new in zip(before, (k_SKD, v_SKD), strict=True)
            )
            kept[slot] = k, v
            q, k, v = (x.transpose(0, 1)[None] for x in (q_SND[i : i + 1], k, v))
            shared = q.size(1) != k.size(1)
            out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=shared)
            out_SND[i] = out[0, :, 0]
        return out_SND

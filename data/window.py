"""Windows of the ViT: a second partition of a pack's patches, beside that into frames.

Most layers of a ViT with windows attend within squares of a frame only. For that the patches are
brought into an order in which each window lies together; frames stay together in it, so the layers
that see whole frames need no other order. Windows at the right and lower edge of a frame are cut,
not padded, and none reaches into another frame.

P patches of a pack, merge**2 of them a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
import torch
from torch import Tensor

from triptych.configs.model_schema import VisionConfig
from triptych.data.partition import Partition


@dataclass(frozen=True, slots=True)
class WindowOrder:
    """The order of a pack's tokens in which the windows follow each other."""

    tokens: Tensor
    """(P / merge**2,) int64: the number, in merge order, of each token in this order."""
    places: Tensor
    """(P / merge**2,) int64: the place in this order of each token in merge order."""
    windows: Partition
    """The windows, in patches."""
    patches_per_token: int

    @classmethod
    def of(cls, grid_thw: Tensor, config: VisionConfig) -> Self:
        """The windows of a pack, each at most ``config.window_size`` pixels high and wide.

        Args:
            grid_thw: (num_images, 3) int64 on the CPU, in unmerged patches.
            config: the tower, with windows.

        Source: transformers vision_utils.py, get_vision_window_index, which pads and drops again.
        """
        merge, side = config.spatial_merge_size, config.window_size // config.resize_factor
        orders, lengths, start = [np.empty(0, dtype=np.int64)], [], 0
        for t, h, w in grid_thw.tolist():
            rows, columns = np.arange(h // merge), np.arange(w // merge)
            windows_per_row = -(-len(columns) // side)
            window = (rows[:, None] // side * windows_per_row + columns // side).ravel()
            in_frame = window.argsort(kind="stable")
            for _ in range(t):
                orders.append(in_frame + start)
                lengths += (np.bincount(window) * merge**2).tolist()
                start += len(window)
        tokens = torch.from_numpy(np.concatenate(orders))
        windows = Partition.of(list(accumulate(lengths, initial=0)))
        return cls(tokens, tokens.argsort(), windows, config.patches_per_token)

    def each(self, function: Callable[[Tensor], Tensor]) -> "WindowOrder":
        """The same, its tensors moved."""
        return WindowOrder(
            function(self.tokens),
            function(self.places),
            self.windows.each(function),
            self.patches_per_token,
        )

    def arrange(self, x_P: Tensor) -> Tensor:
        """(P, ...) in merge order -> the same in this order."""
        return self._permute(x_P, self.tokens)

    def restore(self, x_P: Tensor) -> Tensor:
        """(P, ...) in this order -> the same in merge order."""
        return self._permute(x_P, self.places)

    def _permute(self, x_P: Tensor, tokens: Tensor) -> Tensor:
        by_token = x_P.view(-1, self.patches_per_token, *x_P.shape[1:])
        return by_token.index_select(0, tokens).flatten(0, 1)

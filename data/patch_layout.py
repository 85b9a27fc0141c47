"""What the ViT needs to know of a pack's patches besides their pixels; it follows from the grids.

Made by the loader, so that no microbatch waits for it: only what is cheap on a device, the angles
of the rotary embedding, is left to the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from triptych.configs.model_schema import VisionConfig
from triptych.data.partition import Partition
from triptych.data.window import WindowOrder


@dataclass(frozen=True, slots=True)
class PatchLayout:
    """Where the P patches of a pack lie, and which attend to each other."""

    positions: Tensor
    """(P, 2) int64: row and column in the frame, in the order in which the layers see patches."""
    frames: Partition
    windows: WindowOrder | None
    """None where no layer sees windows; then the layers see merge order."""

    @classmethod
    def of(cls, grid_thw: Tensor, config: VisionConfig) -> Self:
        """Lay out the patches of a pack.

        Args:
            grid_thw: (num_media, 3) int64 on the CPU, in unmerged patches.
            config: the tower.
        """
        positions = patch_positions(grid_thw, config.spatial_merge_size)
        windows = WindowOrder.of(grid_thw, config) if config.window_size else None
        return cls(
            positions=positions if windows is None else windows.arrange(positions),
            frames=Partition.of(frame_bounds(grid_thw)),
            windows=windows,
        )

    def each(self, function: Callable[[Tensor], Tensor]) -> "PatchLayout":
        """The same, its tensors moved."""
        return PatchLayout(
            positions=function(self.positions),
            frames=self.frames.each(function),
            windows=self.windows and self.windows.each(function),
        )


def frame_bounds(grid_thw: Tensor) -> list[int]:
    """Boundaries of the attention segments: one per frame of every image or video. Starts at 0."""
    frames = [h * w for t, h, w in grid_thw.tolist() for _ in range(t)]
    return list(accumulate(frames, initial=0))


def patch_positions(grid_thw: Tensor, merge: int) -> Tensor:
    """Row and column of every patch, in merge order. Returns (P, 2) int64."""
    positions = [torch.empty(0, 2, dtype=torch.int64)]
    for t, h, w in grid_thw.tolist():
        positions += [_frame_positions(h, w, merge)] * t
    return torch.cat(positions)


@lru_cache(maxsize=2**6)
def _frame_positions(h: int, w: int, merge: int) -> Tensor:
    """(h * w, 2) int64; remembered, for grids recur. Not to be changed."""
    rows = torch.arange(h).view(-1, 1).expand(h, w)
    columns = torch.arange(w).view(1, -1).expand(h, w)
    tiled = (
        x.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).flatten()
        for x in (rows, columns)
    )
    return torch.stack(list(tiled), dim=-1)

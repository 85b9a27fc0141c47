"""Temporal, height and width positions of multimodal rotary embedding (M-RoPE)."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triptych.errors import DataError


def build_position_ids(
    input_ids: Tensor,
    grid_thw: Tensor,
    *,
    image_pad: int,
    video_pad: int,
    spatial_merge_size: int,
) -> Tensor:
    """Positions along the three axes for one sequence, which starts at 0.

    Text moves all three axes together. Patches count frames, rows and columns from the position
    where they begin; the text after them resumes at the largest position so far, over all three
    axes, + 1.

    Args:
        input_ids: (T,) int64, one placeholder id per merged patch.
        grid_thw: (num_media, 3) int64, in unmerged patches, in order of appearance.
        image_pad: placeholder id of images.
        video_pad: placeholder id of videos.
        spatial_merge_size: patches per token along each side (2 in Qwen2-VL).
    Returns:
        (3, T) int64.
    Raises:
        DataError: a placeholder run is not t*h*w / spatial_merge_size**2 tokens long, or the number
            of runs is not that of the media.
    Source: arXiv 2409.12191 §2.1. transformers 5 is no oracle here: it resumes after max(h, w) and
        forgets t, so after a long video its text begins too early.
    """
    ids = input_ids.numpy()
    starts, lengths = _runs((ids == image_pad) | (ids == video_pad))
    grids: list[list[int]] = grid_thw.tolist()
    merged = [(t, h // spatial_merge_size, w // spatial_merge_size) for t, h, w in grids]
    if lengths != [t * h * w for t, h, w in merged]:
        raise DataError(
            f"placeholder runs of {lengths} tokens do not fit media grids of {merged} merged "
            "patches  -> each image or video needs exactly one run of t*h*w placeholders"
        )
    positions = np.empty((3, len(ids)), dtype=np.int64)
    end, position = 0, 0
    for start, length, grid in zip(starts, lengths, merged, strict=True):
        positions[:, end:start] = np.arange(position, position + start - end)
        position += start - end
        end = start + length
        positions[:, start:end] = _patch_indices(*grid) + position
        position += max(grid)
    positions[:, end:] = np.arange(position, position + len(ids) - end)
    return torch.from_numpy(positions)


@lru_cache(maxsize=2**6)
def _patch_indices(t: int, h: int, w: int) -> NDArray[np.int64]:
    """(3, t * h * w) int64; remembered, for grids recur. Not to be changed."""
    return np.indices((t, h, w)).reshape(3, -1)


def _runs(mask: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Starts and lengths of the runs of True."""
    framed = np.zeros(len(mask) + 2, dtype=np.bool_)
    framed[1:-1] = mask
    edges = np.flatnonzero(framed[1:] != framed[:-1])
    starts: list[int] = edges[::2].tolist()
    ends: list[int] = edges[1::2].tolist()
    return starts, [end - start for start, end in zip(starts, ends, strict=True)]

"""Samples to one batch: segments laid end to end, labels shifted within each, padding as a segment.

input_ids   a b c d   x y z   p       p = <|endoftext|>, up to a multiple of pad_to
labels      b c d x   y z p   p       next token; what crosses a boundary never counts
loss_mask   1 1 1 0   1 1 0   0       where every token after the first of a segment is a target
segments    0         4       7  8
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triptych.configs.model_schema import ModelConfig
from triptych.data.batch import Batch, index_of
from triptych.data.loading.mrope import build_position_ids
from triptych.data.patch_layout import PatchLayout
from triptych.data.tokens import placeholders
from triptych.data.types import SampleId


@dataclass(frozen=True, slots=True)
class Segment:
    """One sample as the model sees it."""

    sample_id: SampleId
    input_ids: NDArray[np.int32]
    """(num_tokens,) with placeholders repeated."""
    targets: NDArray[np.uint8]
    """(num_tokens,) 1 where the token itself is a target."""
    grid_thw: NDArray[np.int64]
    """(num_media, 3) in unmerged patches, in order of appearance."""
    pixels: tuple[NDArray[np.uint8], ...]
    """(num_patches, patch_dim) of each media item; empty where no pixels are read."""


def collate(
    segments: Sequence[Segment], model: ModelConfig, *, pad_to: int, with_pixels: bool
) -> Batch:
    """Join samples into one microbatch.

    Args:
        segments: at least one, in order.
        model: ids of its special tokens, and the geometry of its patches.
        pad_to: the batch is padded to a multiple of this many tokens.
        with_pixels: whether the segments carry pixels.

    Raises:
        DataError: a segment's placeholders do not fit its media.
    """
    tokens, patch_dim = model.tokens, model.vision.patch_dim
    num_tokens = sum(len(segment.input_ids) for segment in segments)
    num_padding = -num_tokens % pad_to
    padding = np.full(num_padding, tokens.endoftext, dtype=np.int64)
    input_ids = np.concatenate([*(segment.input_ids for segment in segments), padding])
    grid_thw = np.concatenate([segment.grid_thw for segment in segments])
    lengths = [len(segment.input_ids) for segment in segments] + [num_padding] * (num_padding > 0)
    positions = [_position_ids(segment, model) for segment in segments]
    positions.append(torch.arange(num_padding).expand(3, num_padding))
    segment_bounds = list(accumulate(lengths, initial=0))
    loss_mask = torch.from_numpy(_loss_mask(segments, len(input_ids)))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(np.append(input_ids[1:], np.int64(tokens.endoftext))),
        loss_mask=loss_mask,
        supervised_index=index_of(loss_mask),
        position_ids=torch.cat(positions, dim=1),
        segments=segment_bounds,
        cu_seqlens=torch.tensor(segment_bounds, dtype=torch.int32),
        grid_thw=torch.from_numpy(grid_thw),
        patches=PatchLayout.of(torch.from_numpy(grid_thw), model.vision),
        vision_index=torch.from_numpy(np.flatnonzero(placeholders(input_ids, tokens))),
        pixel_values=_pixel_values(segments, patch_dim) if with_pixels else None,
        patch_dim=patch_dim,
        sample_ids=tuple(segment.sample_id for segment in segments),
        num_tokens=num_tokens,
        num_patches=int(grid_thw.prod(axis=1).sum()),
    )


def _position_ids(segment: Segment, model: ModelConfig) -> Tensor:
    """(3, num_tokens) int64; every segment starts at 0."""
    return build_position_ids(
        torch.from_numpy(segment.input_ids),
        torch.from_numpy(segment.grid_thw),
        image_pad=model.tokens.image_pad,
        video_pad=model.tokens.video_pad,
        spatial_merge_size=model.vision.spatial_merge_size,
    )


def _loss_mask(segments: Sequence[Segment], length: int) -> NDArray[np.bool_]:
    """(length,) True where the next token is a target of the same segment."""
    mask = np.zeros(length, dtype=np.bool_)
    start = 0
    for segment in segments:
        mask[start : start + len(segment.targets) - 1] = segment.targets[1:]
        start += len(segment.targets)
    return mask


def _pixel_values(segments: Sequence[Segment], patch_dim: int) -> Tensor:
    """(num_patches, patch_dim) uint8; no rows where all is text."""
    pixels = [patches for segment in segments for patches in segment.pixels]
    return torch.from_numpy(np.concatenate([np.empty((0, patch_dim), dtype=np.uint8), *pixels]))

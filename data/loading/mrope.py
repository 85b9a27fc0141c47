"""Temporal, height and width positions of multimodal rotary embedding (M-RoPE)."""

import torch
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
    is_media = (input_ids == image_pad) | (input_ids == video_pad)
    starts, lengths = _runs(is_media)
    grids: list[list[int]] = grid_thw.tolist()
    merged = [(t, h // spatial_merge_size, w // spatial_merge_size) for t, h, w in grids]
    if lengths != [t * h * w for t, h, w in merged]:
        raise DataError(
            f"placeholder runs of {lengths} tokens do not fit media grids of {merged} merged "
            "patches  -> each image or video needs exactly one run of t*h*w placeholders"
        )
    pieces = []
    end, position = 0, 0
    for start, length, (t, h, w) in zip(starts, lengths, merged, strict=True):
        pieces.append(_text_positions(position, start - end))
        position += start - end
        axes = (torch.arange(t), torch.arange(h), torch.arange(w))
        patches = torch.stack(torch.meshgrid(*axes, indexing="ij")).view(3, length)
        pieces.append(patches + position)
        position += max(t, h, w)
        end = start + length
    pieces.append(_text_positions(position, len(input_ids) - end))
    return torch.cat(pieces, dim=1)


def _text_positions(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, length)


def _runs(mask: Tensor) -> tuple[list[int], list[int]]:
    """Starts and lengths of the runs of True."""
    padded = torch.zeros(len(mask) + 2, dtype=torch.int8)
    padded[1:-1] = mask
    steps = padded.diff()
    starts: list[int] = (steps == 1).nonzero().view(-1).tolist()
    ends: list[int] = (steps == -1).nonzero().view(-1).tolist()
    return starts, [end - start for start, end in zip(starts, ends, strict=True)]

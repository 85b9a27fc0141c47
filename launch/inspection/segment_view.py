"""A batch taken apart for people: of each segment its tokens as text, and its media as frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from triptych.configs.model_schema import ModelConfig, VisionConfig
from triptych.data.batch import Batch
from triptych.data.tokenizer import Tokenizer

MOST_BYTES_OF_A_CHARACTER = 4
"""Of UTF-8; tokens of bytes that make no character after so many are shown as they are."""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A token, several that make one character, or all placeholders of one media item."""

    text: str
    positions: str
    """On the three axes of M-RoPE."""
    is_target: bool
    """The loss counts whether it was foreseen."""
    is_media: bool


@dataclass(frozen=True, slots=True)
class SegmentView:
    """One sample of a batch."""

    start: int
    """Its first token in the batch."""
    end: int
    num_targets: int
    pieces: list[TextPiece]
    media: list[NDArray[np.uint8]]
    """(num_frames, height, width, 3) of each image or video, as resized; of an image one frame."""


def segment_views(batch: Batch, model: ModelConfig, tokenizer: Tokenizer) -> list[SegmentView]:
    """The segments of a batch that was read with its pixels.

    Args:
        batch: on the CPU.
        model: that it was made for.
        tokenizer: of its text.
    """
    ids = batch.input_ids.numpy()
    is_target = np.roll(batch.loss_mask.numpy(), 1)  # the position before a target counts
    positions = batch.position_ids.numpy()
    is_pad = np.zeros(len(ids), dtype=np.bool_)
    is_pad[batch.vision_index.numpy()] = True
    frames = _frames(batch, model)
    views = []
    for start, end in pairwise(batch.segments):
        here = slice(start, end)
        columns = (ids[here], is_target[here], positions[:, here], is_pad[here])
        pieces = list(_pieces(*columns, tokenizer))
        media = [next(frames) for piece in pieces if piece.is_media]
        views.append(SegmentView(start, end, int(is_target[here].sum()), pieces, media))
    return views


def _pieces(
    ids: NDArray[np.int64],
    is_target: NDArray[np.bool_],
    positions: NDArray[np.int64],
    is_pad: NDArray[np.bool_],
    tokenizer: Tokenizer,
) -> Iterator[TextPiece]:
    for is_media, run in groupby(range(len(ids)), key=is_pad.__getitem__):
        places = list(run)
        if is_media:
            first, last = positions[:, places[0]], positions[:, places].max(axis=1)
            axes = zip("thw", first, last, strict=True)
            told = " ".join(f"{axis} {low}-{high}" for axis, low, high in axes)
            pad = tokenizer.decode([int(ids[places[0]])])
            yield TextPiece(f"{pad} x {len(places)}", told, False, True)
            continue
        for group in _characters(ids, is_target, places, tokenizer):
            low, high = (int(positions[0, place]) for place in (group[0], group[-1]))
            told = str(low) if low == high else f"{low}-{high}"
            text = tokenizer.decode(ids[group].tolist())
            yield TextPiece(text, told, bool(is_target[group[0]]), False)


def _characters(
    ids: NDArray[np.int64], is_target: NDArray[np.bool_], places: list[int], tokenizer: Tokenizer
) -> Iterator[list[int]]:
    """Single tokens, but those together that are the bytes of one character."""
    group: list[int] = []
    for place in places:
        if group and is_target[place] != is_target[group[0]]:
            yield group
            group = []
        group.append(place)
        is_whole = not tokenizer.decode(ids[group].tolist()).endswith("\N{REPLACEMENT CHARACTER}")
        if is_whole or len(group) == MOST_BYTES_OF_A_CHARACTER:
            yield group
            group = []
    if group:
        yield group


def _frames(batch: Batch, model: ModelConfig) -> Iterator[NDArray[np.uint8]]:
    """The pixels of each media item put together again."""
    assert batch.pixel_values is not None
    pixels, start = batch.pixel_values.numpy(), 0
    for t, h, w in batch.grid_thw.tolist():
        frames = join_patches(pixels[start : start + t * h * w], (t, h, w), model.vision)
        pad = batch.input_ids[batch.vision_index[start // model.vision.patches_per_token]]
        yield frames[:1] if pad == model.tokens.image_pad else frames
        start += t * h * w


def join_patches(
    patches: NDArray[np.uint8], grid: tuple[int, int, int], vision: VisionConfig
) -> NDArray[np.uint8]:
    """The inverse of ``data.media.image.cut_patches``, but with the colours last.

    Args:
        patches: (t*h*w, patch_dim).
        grid: (t, h, w), in unmerged patches.
        vision: size of a patch, and how many are a token.
    Returns:
        (t * temporal_patch_size, height, width, 3).
    """
    depth, merge, side = vision.temporal_patch_size, vision.spatial_merge_size, vision.patch_size
    t, h, w = grid
    cut = patches.reshape(t, h // merge, w // merge, merge, merge, 3, depth, side, side)
    return cut.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(t * depth, h * side, w * side, 3)

"""A batch, worked out by hand, and its invariants over random segments."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.configs.model_schema import ModelConfig, TokensConfig, VisionConfig
from triptych.costs.flops import Workload
from triptych.data.loading.collate import Segment, collate
from triptych.data.types import SampleId
from triptych.errors import DataError

TOKENS = TokensConfig(endoftext=9, image_pad=3, video_pad=4)
MODEL = ModelConfig(tokens=TOKENS)
PAD = 3


def segment(ids, targets, grids=(), index=0, pixel=None):
    grid_thw = np.array(grids, dtype=np.int64).reshape(-1, 3)
    pixels = [np.full((grid.prod(), 1176), pixel or 0, np.uint8) for grid in grid_thw]
    return Segment(
        SampleId(0, index),
        np.array(ids, dtype=np.int32),
        np.array(targets, dtype=np.uint8),
        grid_thw,
        () if pixel is None else tuple(pixels),
    )


def test_patches_of_a_frame_see_only_each_other():
    """An image of 4 patches and two frames of 8."""
    shown = segment([PAD, 1, 4, 4, 4, 4], [0] * 6, [(1, 2, 2), (2, 2, 4)])
    batch = collate([shown], MODEL, pad_to=4, with_pixels=False)
    assert batch.workload == Workload(6, 6**2, 4 + 2 * 8, 4**2 + 2 * 8**2, num_supervised_tokens=0)


def test_batch_by_hand():
    """An image of 4x6 patches in text, then text, padded to a multiple of 4."""
    segments = [
        segment([1, *[PAD] * 6, 2, 50, 51], [0, *[0] * 6, 0, 1, 1], [(1, 4, 6)], index=7, pixel=8),
        segment([60, 61, 62], [1, 1, 1], index=3),
    ]
    batch = collate(segments, MODEL, pad_to=4, with_pixels=True)
    image, text = [1, *[PAD] * 6, 2, 50, 51], [60, 61, 62]
    assert batch.input_ids.tolist() == [*image, *text, 9, 9, 9]
    assert batch.labels.tolist() == [*image[1:], *text, 9, 9, 9, 9]
    assert batch.loss_mask.nonzero().view(-1).tolist() == [7, 8, 10, 11]
    assert batch.supervised_index.tolist() == [7, 8, 10, 11]
    assert batch.segments == batch.cu_seqlens.tolist() == [0, 10, 13, 16]
    assert batch.patches.frames.bounds == batch.patches.frames.cu_seqlens.tolist() == [0, 24]
    assert batch.patches.positions[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert batch.vision_index.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.grid_thw.tolist() == [[1, 4, 6]]
    assert batch.position_ids.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 0, 1, 2, 0, 1, 2],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 0, 1, 2, 0, 1, 2],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1, 2],
    ]
    assert batch.pixel_values.shape == (24, 1176)
    assert (batch.pixel_values == 8).all()
    assert batch.sample_ids == ((0, 7), (0, 3))
    assert (batch.num_tokens, batch.num_patches) == (13, 24)
    assert batch.workload == Workload(13, 10**2 + 3**2, 24, 24**2, num_supervised_tokens=4)
    dtypes = {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.bool,
        "supervised_index": torch.int64,
        "cu_seqlens": torch.int32,
        "position_ids": torch.int64,
        "grid_thw": torch.int64,
        "vision_index": torch.int64,
        "pixel_values": torch.uint8,
    }
    assert {name: getattr(batch, name).dtype for name in dtypes} == dtypes


def test_text_only_batch_has_empty_vision():
    batch = collate([segment([60, 61], [1, 1])], MODEL, pad_to=1, with_pixels=True)
    assert batch.pixel_values.shape == (0, 1176)
    assert batch.grid_thw.shape == (0, 3)
    assert batch.patches.positions.shape == (0, 2)
    assert batch.vision_index.numel() == batch.num_patches == 0


def test_what_is_left_out_does_not_count():
    batch = collate(
        [segment([60, 61, 62], [1, 1, 1]), segment([63, 64], [1, 1])],
        MODEL,
        pad_to=1,
        with_pixels=True,
    )
    assert batch.num_supervised_tokens == 3
    batch.leave_out(0, 3)
    assert batch.supervised_index.tolist() == batch.loss_mask.nonzero().view(-1).tolist() == [3]
    assert batch.workload.num_supervised_tokens == 1


@pytest.mark.parametrize("window_size", [0, 112])
def test_only_what_the_host_reads_stays_on_the_host(window_size):
    model = ModelConfig(tokens=TOKENS, vision=VisionConfig(window_size=window_size))
    batch = collate(
        [segment([1, PAD, PAD, 2], [0] * 4, [(1, 2, 4)], pixel=1)],
        model,
        pad_to=1,
        with_pixels=True,
    )
    moved = batch.each(lambda tensor: tensor.to("meta"))
    assert {name for name, tensor in tensors_in(moved) if not tensor.is_meta} == {
        "loss_mask",
        "grid_thw",
    }
    assert len(list(tensors_in(moved))) == (14 if window_size else 11)


def tensors_in(found: object) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a dataclass and of the dataclasses in it."""
    for field in fields(found):
        value = getattr(found, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value
        elif is_dataclass(value):
            yield from tensors_in(value)


def test_where_no_pixels_are_read_all_else_is_the_same():
    ids, targets, grids = [1, PAD, PAD, 2], [0, 0, 0, 0], [(1, 2, 4)]
    read = collate([segment(ids, targets, grids, pixel=1)], MODEL, pad_to=2, with_pixels=True)
    not_read = collate([segment(ids, targets, grids)], MODEL, pad_to=2, with_pixels=False)
    assert not_read.pixel_values is None
    for name in ("input_ids", "labels", "loss_mask", "position_ids", "vision_index", "grid_thw"):
        assert torch.equal(getattr(read, name), getattr(not_read, name))
    assert not_read.num_patches == read.num_patches == 8


def test_no_target_is_predicted_across_a_boundary():
    batch = collate(
        [segment([60], [1]), segment([61, 62], [1, 0])], MODEL, pad_to=1, with_pixels=False
    )
    assert not batch.loss_mask.any()


def test_placeholders_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="do not fit media grids"):
        collate([segment([1, PAD, 2], [0] * 3, [(1, 4, 4)])], MODEL, pad_to=1, with_pixels=False)


texts = st.lists(st.tuples(st.integers(20, 90), st.integers(0, 1)), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=6), st.integers(1, 8))
def test_every_batch_keeps_the_invariants(samples, pad_to):
    segments = [segment(*zip(*sample, strict=True), index=i) for i, sample in enumerate(samples)]
    batch = collate(segments, MODEL, pad_to=pad_to, with_pixels=False)
    length = len(batch.input_ids)
    assert length % pad_to == 0
    assert 0 <= length - batch.num_tokens < pad_to
    assert batch.segments[0] == 0
    assert batch.segments[-1] == length
    assert batch.labels[:-1].tolist() == batch.input_ids[1:].tolist()
    for start, end in zip(batch.segments[:-1], batch.segments[1:], strict=True):
        assert not batch.loss_mask[end - 1]
        assert batch.position_ids[:, start:end].tolist() == [list(range(end - start))] * 3
    supervised = sum(target for sample in samples for _, target in sample[1:])
    assert batch.loss_mask.sum() == supervised
    assert (batch.input_ids[batch.num_tokens :] == TOKENS.endoftext).all()

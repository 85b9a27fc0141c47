"""Windows lie where transformers puts them, whatever the images; their order can be undone."""

from itertools import product

import pytest
import torch

from triptych.configs.model_schema import VisionConfig
from triptych.data.window import WindowOrder

WINDOWED = VisionConfig(window_size=112, full_attention_layers=[7, 15, 23, 31])
PACKS = [
    *([(1, 2 * rows, 2 * columns)] for rows, columns in product(range(1, 14), repeat=2)),
    [(2, 10, 6)],
    [(1, 4, 4), (3, 18, 10)],
    [(4, 36, 66), (1, 22, 26), (1, 2, 2)],
]


def test_orders_and_bounds_are_those_of_transformers() -> None:
    from transformers.vision_utils import get_vision_window_index  # late: it takes 4 s

    for grids in PACKS:
        grid_thw = torch.tensor(grids)
        order, bounds = get_vision_window_index(grid_thw, 2, 112, 14)
        ours = WindowOrder.of(grid_thw, WINDOWED)
        assert torch.equal(ours.tokens, order), grids
        assert ours.windows.bounds == bounds.tolist(), grids


def test_six_by_six_tokens_by_hand() -> None:
    """A whole window, one cut at the right, one cut below, one cut on both sides."""
    order = WindowOrder.of(torch.tensor([[1, 12, 12]]), WINDOWED)
    assert order.tokens.tolist() == [
        *(0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21),
        *(4, 5, 10, 11, 16, 17, 22, 23),
        *(24, 25, 26, 27, 30, 31, 32, 33),
        *(28, 29, 34, 35),
    ]
    assert order.windows.bounds == [0, 64, 96, 128, 144]


@pytest.mark.parametrize(
    ("config", "grids"),
    [
        (WINDOWED, [(3, 18, 10), (1, 2, 2)]),
        (VisionConfig(patch_size=8, spatial_merge_size=3, window_size=48), [(2, 9, 12), (1, 3, 3)]),
        (VisionConfig(spatial_merge_size=1, window_size=28), [(1, 5, 3)]),
    ],
)
def test_patches_come_back_and_no_window_leaves_its_frame(config, grids) -> None:
    order = WindowOrder.of(torch.tensor(grids), config)
    frames = [h * w for t, h, w in grids for _ in range(t)]
    frame_of_P = torch.arange(len(frames)).repeat_interleave(torch.tensor(frames))
    arranged = order.arrange(frame_of_P)
    assert torch.equal(arranged, frame_of_P), "frames stay where they were"
    patches = torch.arange(sum(frames))
    assert torch.equal(order.restore(order.arrange(patches)), patches)
    assert order.windows.bounds[-1] == len(patches)
    for start, end in zip(order.windows.bounds, order.windows.bounds[1:], strict=False):
        assert 0 < end - start <= config.patches_per_window
        assert len(arranged[start:end].unique()) == 1

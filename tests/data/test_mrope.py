"""M-RoPE positions, worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.data.loading.mrope import build_position_ids
from triptych.errors import DataError

TEXT, START, END, IMAGE, VIDEO = 0, 1, 2, 3, 4


def positions(ids: list[int], grids: list[tuple[int, int, int]]) -> list[list[int]]:
    result = build_position_ids(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        image_pad=IMAGE,
        video_pad=VIDEO,
        spatial_merge_size=2,
    )
    assert result.dtype == torch.int64
    return result.tolist()


def digits(text: str) -> list[int]:
    return [int(c) for c in text]


def test_text_moves_all_axes_together():
    assert positions([TEXT] * 4, []) == [[0, 1, 2, 3]] * 3


def test_empty_sequence():
    assert positions([], []) == [[], [], []]


def test_the_papers_video_then_text():
    assert positions([VIDEO] * 12 + [TEXT] * 5, [(3, 4, 4)]) == [
        [*digits("000011112222"), 3, 4, 5, 6, 7],
        [*digits("001100110011"), 3, 4, 5, 6, 7],
        [*digits("010101010101"), 3, 4, 5, 6, 7],
    ]


def test_wide_image_between_texts():
    ids = [TEXT, START] + [IMAGE] * 6 + [END, TEXT]
    assert positions(ids, [(1, 4, 6)]) == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_text_resumes_after_the_time_axis_of_a_long_video():
    ids = [TEXT] + [VIDEO] * 5 + [TEXT]
    assert positions(ids, [(5, 2, 2)]) == [
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 1, 1, 1, 1, 6],
        [0, 1, 1, 1, 1, 1, 6],
    ]


def test_image_and_video_in_one_sequence():
    ids = [IMAGE] * 2 + [TEXT] + [VIDEO] * 4 + [TEXT]
    assert positions(ids, [(1, 4, 2), (2, 2, 4)]) == [
        [0, 0, 2, 3, 3, 4, 4, 5],
        [0, 1, 2, 3, 3, 3, 3, 5],
        [0, 0, 2, 3, 4, 3, 4, 5],
    ]


def test_clips_of_one_video_between_the_turns_of_a_dialogue():
    """Each clip begins anew after the text before it: its time is not that of the video."""
    ids = [TEXT, START] + [VIDEO] * 2 + [END, TEXT, START] + [VIDEO] * 6 + [END, TEXT]
    ids += [START] + [VIDEO] * 3 + [END]
    assert positions(ids, [(2, 2, 2), (3, 2, 4), (3, 2, 2)]) == [
        [0, 1, 2, 3, 4, 5, 6, *[7, 7, 8, 8, 9, 9], 10, 11, 12, *[13, 14, 15], 16],
        [0, 1, 2, 2, 4, 5, 6, *[7, 7, 7, 7, 7, 7], 10, 11, 12, *[13, 13, 13], 16],
        [0, 1, 2, 2, 4, 5, 6, *[7, 8, 7, 8, 7, 8], 10, 11, 12, *[13, 13, 13], 16],
    ]


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([IMAGE] * 3, [(1, 4, 4)]),
        ([IMAGE] * 4, []),
        ([TEXT] * 4, [(1, 2, 2)]),
        ([IMAGE, TEXT, IMAGE], [(1, 2, 4)]),
        ([IMAGE, TEXT], [(1, 2, 2), (1, 2, 2)]),
    ],
)
def test_placeholders_that_do_not_fit_are_refused(ids, grids):
    with pytest.raises(DataError, match="do not fit media grids"):
        positions(ids, grids)


grids = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), grids), max_size=5), st.integers(0, 3))
def test_every_position_is_reached_and_text_never_goes_back(parts, tail):
    """Positions rise without a gap: each text token is 1 beyond all that came before it."""
    ids: list[int] = []
    for num_text, (t, h, w) in parts:
        ids += [TEXT] * num_text + [IMAGE if t == 1 else VIDEO] * (t * h * w)
    ids += [TEXT] * tail
    result = torch.tensor(positions(ids, [(t, 2 * h, 2 * w) for _, (t, h, w) in parts]))
    largest = result.max(dim=0).values
    for i, token in enumerate(ids):
        if token == TEXT:
            expected = int(largest[:i].max()) + 1 if i else 0
            assert result[:, i].tolist() == [expected] * 3

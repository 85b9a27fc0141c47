"""Every picture is read and decoded once, by tp rank 0 of the first stage, in every layout."""

import json
from collections import Counter
from unittest import mock

import pytest

from triptych.configs.schema import Config
from triptych.data.dataset.dataset import Dataset
from triptych.data.loading.joined_media import JoinedMedia
from triptych.data.loading.loader import Loader
from triptych.data.media import kinds
from triptych.tests.helpers.runs import COVERING, LAYOUTS, STAGE2, train

pytestmark = pytest.mark.distributed

READING_RANKS = {
    "single": [0],
    "dp2": [0, 1],
    "tp2": [0],
    "pp2": [0],
    "tp2 pp2": [0],
    "dp2 pp2 interleaved": [0, 1],
}


def count_decodes(config: Config) -> tuple[int, int, int]:
    """Train; returns what the loader says it decoded, and decodes and reads as counted here."""
    calls, told = Counter(), []
    read, close = JoinedMedia.read, Loader.close

    def counted(decode):
        def counted_decode(*args):
            calls["decode"] += 1
            return decode(*args)

        return counted_decode

    def counted_read(self, number):
        calls["read"] += 1
        return read(self, number)

    def telling_close(self):
        close(self)
        told.append(self.num_decoded)

    with (
        mock.patch.object(kinds, "decode_image", counted(kinds.decode_image)),
        mock.patch.object(kinds, "video_frames", counted(kinds.video_frames)),
        mock.patch.object(JoinedMedia, "read", counted_read),
        mock.patch.object(Loader, "close", telling_close),
    ):
        train(config)
    return told[0], calls["decode"], calls["read"]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if name in COVERING else pytest.mark.slow) for name in LAYOUTS],
)
def test_decodes_are_as_many_as_pictures(layout, runs, digits):
    """``prefetch_steps=0``: nothing is read ahead of the last step."""
    counts = runs.call(count_decodes, "run", layout, "train.num_steps=3", "data.prefetch_steps=0")
    sources = [Dataset.open(digits / name, name) for name in STAGE2]
    num_pictures = 0
    for ledger in (runs.dir("run") / "ledger").iterdir():
        for line in map(json.loads, ledger.read_text().splitlines()):
            num_pictures += sum(len(sources[s].sample(i).media) for s, i in line["samples"])
    assert num_pictures > 20
    assert [sum(of_ranks) for of_ranks in zip(*counts, strict=True)] == [num_pictures] * 3
    busy = [rank for rank, of_rank in enumerate(counts) if any(of_rank)]
    assert busy == READING_RANKS[layout]


@pytest.mark.parametrize("layout", ["tp2 pp2"])
def test_validation_reads_once_too(layout, runs):
    options = ("train.num_steps=1", "data.prefetch_steps=0")
    without = runs.call(count_decodes, "without", layout, *options)
    validated = runs.call(count_decodes, "with", layout, *options, "train.validate_every=1")
    assert validated[0][1] > without[0][1]
    assert validated[1:] == without[1:] == [(0, 0, 0)] * 3

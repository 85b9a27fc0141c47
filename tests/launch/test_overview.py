"""``report.png``: every sample and medium is in its bin, and the command draws it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import triptych
from triptych.data.dataset.dataset import Dataset
from triptych.data.tokenizer import SYSTEM_PROMPT, train_tokenizer
from triptych.data.types import MediaKind
from triptych.launch import prepare
from triptych.launch.inspection import overview
from triptych.launch.inspection.overview import DURATIONS_S, LENGTHS, SIDES, Overview, draw_overview

EXAMPLES = Path(triptych.__file__).parent / "docs/examples"


def prepared(work: Path, *names: str) -> Dataset:
    train_tokenizer([SYSTEM_PROMPT, "The disc is red."], work / "tokenizer", 300)
    inputs = [str(EXAMPLES / f"{name}.jsonl") for name in names]
    where = ["--images", str(EXAMPLES), "--tokenizer", str(work / "tokenizer")]
    prepare.main(["--input", *inputs, *where, "--output", str(work / "out")])
    return Dataset.open(work / "out", "out")


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_everything_is_in_its_bin(tmp_path, monkeypatch, chunk):
    """By hand: a clip of 112x84 for 2 s, a shape of 112x84, two screens of 84x140."""
    monkeypatch.setattr(overview, "CHUNK", chunk)
    dataset = prepared(tmp_path, "video_qa", "vqa", "agent", "text_only")
    counted = Overview.of(dataset)
    lengths = [len(dataset.sample(i).input_ids) for i in range(4)]
    assert counted.longest == max(lengths)
    assert counted.lengths.tolist() == np.histogram(lengths, LENGTHS)[0].tolist()
    for kind, extents in {
        MediaKind.VIDEO: {(112, 84): 1},
        MediaKind.IMAGE: {(112, 84): 1, (84, 140): 2},
    }.items():
        found = {
            (w, h): int(
                counted.sizes[kind][np.searchsorted(SIDES, w) - 1, np.searchsorted(SIDES, h) - 1]
            )
            for w, h in extents
        }
        assert found == extents
        assert counted.sizes[kind].sum() == sum(extents.values())
    assert counted.durations[DURATIONS_S.tolist().index(2.0)] == counted.durations.sum() == 1


def test_a_panel_for_each_kind_that_is_there(tmp_path):
    dataset = prepared(tmp_path, "text_only")
    with Image.open(tmp_path / "out/report.png") as lengths_only:
        width = lengths_only.width
    (tmp_path / "more").mkdir()
    prepared(tmp_path / "more", "video_qa", "vqa")
    with Image.open(tmp_path / "more/out/report.png") as all_panels:
        assert all_panels.width == 4 * width
    draw_overview(dataset, tmp_path / "again.png")
    drawn = (tmp_path / "again.png").read_bytes()
    assert drawn == (tmp_path / "out/report.png").read_bytes()
    dataset.verify()  # the picture is no part of the dataset

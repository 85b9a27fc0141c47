"""The examples of docs/data-format.md: ids as transformers reads them, and which are targets.

``golden_examples.json`` has each example as text, targets between double brackets; written by hand
from the template of Qwen2-VL and of Qwen-Agent.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import triptych
from triptych.configs.model_schema import VisionConfig
from triptych.configs.schema import DataConfig
from triptych.data.dataset.dataset import Dataset
from triptych.data.loading.joined_media import JoinedMedia
from triptych.data.media.kinds import kind_of
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import SYSTEM_PROMPT, train_tokenizer
from triptych.data.types import PixelLimits

EXAMPLES = Path(triptych.__file__).parent / "docs/examples"
GOLDEN = json.loads(Path(__file__).with_name("golden_examples.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([SYSTEM_PROMPT, "The red disc is round. What is it?"] * 3, path, 320)
    return path


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory):
    """All examples, in the order of the golden file."""
    output = tmp_path_factory.mktemp("datasets") / "examples"
    tokenizer = train_tokenizer(
        [SYSTEM_PROMPT, "The red disc is round. What is it?"] * 3, folder, 320
    )
    inputs = [EXAMPLES / f"{name}.jsonl" for name in GOLDEN]
    build_dataset(inputs, output, tokenizer, images=[EXAMPLES])
    return Dataset.open(output, "examples")


def test_every_example_has_its_golden_text_and_its_place_in_the_docs():
    names = {path.stem for path in EXAMPLES.glob("*.jsonl")}
    assert names == set(GOLDEN)
    docs = (EXAMPLES.parent / "data-format.md").read_text()
    assert [name for name in names if f"examples/{name}.jsonl" not in docs] == []


@pytest.mark.parametrize("name", GOLDEN)
def test_an_example_has_its_ids_and_targets(dataset, folder, name):
    pieces = re.split(r"\[\[|\]\]", GOLDEN[name])
    oracle = AutoTokenizer.from_pretrained(folder)
    ids = oracle("".join(pieces)).input_ids
    sample = dataset.sample(list(GOLDEN).index(name))
    assert sample.input_ids.tolist() == ids
    lengths = [len(oracle(piece).input_ids) for piece in pieces]
    targets = np.repeat(np.arange(len(pieces)) % 2, lengths)
    assert sample.targets.tolist() == targets.tolist()
    shown = [item.kind.name.lower() for item in sample.media]
    assert shown == re.findall(r"<\|(image|video)_pad\|>", GOLDEN[name])


def test_the_clips_of_a_stream_are_one_file_that_is_read_once(dataset, monkeypatch):
    media = dataset.sample(list(GOLDEN).index("streaming_video_dialogue")).media
    clips = [(item.start_ms, item.duration_ms, item.frames) for item in media]
    assert clips == [(0, 500, 4), (500, 750, 6), (1250, 750, 6)]
    assert len({(item.shard, item.offset, item.xxh3) for item in media}) == 1
    spans, read_span = [], dataset.read_span
    monkeypatch.setattr(dataset, "read_span", lambda *a: spans.append(a) or read_span(*a))
    files = JoinedMedia(dataset, media)
    contents = [files.read(number) for number in range(len(media))]
    assert len(spans) == 1
    vision, limits = VisionConfig(), PixelLimits.of(DataConfig())
    red_from_left = []
    for item, content in zip(media, contents, strict=True):
        kind = kind_of(item.kind)
        frames = kind.frames(content, item, kind.shape(item, limits, vision), "x").astype(int)
        is_red = (frames[:, 0] > 150) & (frames[:, 1] < 100) & (frames[:, 2] < 100)
        red_from_left += [np.nonzero(frame)[1].mean() / frame.shape[1] for frame in is_red]
    assert red_from_left == sorted(red_from_left)
    assert len(set(red_from_left)) == len(red_from_left) == 4 + 4 + 4

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
from triptych.data.dataset.dataset import Dataset
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import SYSTEM_PROMPT, train_tokenizer

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

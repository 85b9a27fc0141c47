"""Answers while training: what is asked, the same ones in any layout, and nothing else changes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from PIL import Image

from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.data.dataset.dataset import Dataset
from triptych.data.questions import Questions
from triptych.data.tokenizer import load_tokenizer
from triptych.data.types import PixelLimits
from triptych.errors import DataError
from triptych.tests.helpers.runs import Runs, metrics, train, without_times
from triptych.train.hooks.answer_sheet import AnswerSheet
from triptych.train.hooks.evaluation import Answered

distributed = pytest.mark.distributed
ASKED = ("train.evaluate_every=2", "train.evaluation_questions=4", "data.evaluation=[heldout,chat]")
FIRST = "step_000000002"


def chosen(root: Path, folder: Path, name: str, number: int, **limits: int):
    config = load_config([])
    dataset = Dataset.open(root / name, name, folder)
    questions = Questions(dataset, load_tokenizer(root / "tokenizer"))
    limits = {"max_tokens": 256, "max_patches": 1024} | limits
    return questions.choose(number, 0, config.model, PixelLimits.of(config.data), **limits)


def turns_of(record: dict) -> tuple[str, str]:
    question, answer = (message["content"] for message in record["messages"])
    return "".join(part.get("text", "") for part in question).strip(), answer


def test_every_chat_is_asked_up_to_its_answer_and_no_document(digits, tmp_path):
    records = map(json.loads, (digits / "raw" / "heldout.jsonl").read_text().splitlines())
    chats = sorted(turns_of(record) for record in records if "messages" in record)
    found = chosen(digits, tmp_path, "heldout", 1000)
    assert sorted((question.prompt, question.expected) for question in found) == chats
    assert len({question.sample_id for question in found}) == len(chats)
    few = chosen(digits, tmp_path, "heldout", 3)
    assert few == found[:3]


@pytest.mark.parametrize(
    ("name", "limits"),
    [("strings", {}), ("chat", {"max_tokens": 20}), ("chat", {"max_patches": 1})],
)
def test_a_source_without_a_question_that_fits_is_refused(digits, tmp_path, name, limits):
    with pytest.raises(DataError, match=f"none of 120 samples of {name} is a chat that fits"):
        chosen(digits, tmp_path, name, 1000, **limits)


@distributed
@pytest.mark.parametrize(
    "layouts",
    [
        ("tp2",),
        pytest.param(("pp2", "dp2", "tp2 pp2", "dp2 pp2 interleaved"), marks=pytest.mark.slow),
    ],
)
def test_answers_are_the_same_in_every_layout_and_change_no_training(layouts, runs):
    """In 4 steps; the layouts' weights are the same but for rounding."""
    common = ("train.num_steps=4", "data.max_patches=256")
    told = runs.train("alone", "single", *common, *ASKED)
    assert "step 2: answers as expected to " in told
    for layout in layouts:
        runs.train(f"{layout} asked", layout, *common, *ASKED)
        runs.train(layout, layout, *common)
        lines = without_times(runs.dir(f"{layout} asked"))
        accuracies = [line.pop("accuracy", None) for line in lines]
        assert lines == without_times(runs.dir(layout))
        assert [accuracy is None for accuracy in accuracies] == [True, False, True, False]
        for name in (FIRST, "step_000000004"):
            assert answers(runs, f"{layout} asked", name) == answers(runs, "alone", name)
    lines = answers(runs, "alone", FIRST)
    assert [line["source"] for line in lines] == ["heldout"] * 4 + ["chat"] * 4
    assert any(line["answer"] for line in lines)
    assert Image.open(runs.dir("alone") / "evaluation" / f"{FIRST}.png").width > 1000


def answers(runs: Runs, name: str, step: str) -> list[dict]:
    text = (runs.dir(name) / "evaluation" / f"{step}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@distributed
def test_what_cannot_be_read_is_not_asked_and_the_rest_is_counted(runs, pool, digits, tmp_path):
    """Every answer is the most frequent expected one, so some are right; a picture is damaged."""
    root = tmp_path / "damaged"
    shutil.copytree(digits, root)
    dataset = Dataset.open(root / "heldout", "heldout", tmp_path)
    asked = chosen(digits, tmp_path, "heldout", 1000)
    media = dataset.sample(asked[0].sample_id.index).media[0]
    shard = next((root / "heldout" / "shards").iterdir())
    with shard.open("r+b") as file:
        file.seek(media.offset + media.size // 2)
        file.write(b"\xff\xff\xff\xff")
    expected = [question.expected for question in asked]
    word = max(expected, key=expected.count)
    words = ("train.num_steps=1", "train.evaluate_every=1", f"data.root={root}")
    (told,) = runs.call(answering, "run", "single", *words, word=word)
    lines = answers(runs, "run", "step_000000001")
    left_out = {line["index"] for line in lines} ^ {q.sample_id.index for q in asked}
    damaged = {q.sample_id.index for q in asked if media in dataset.sample(q.sample_id.index).media}
    assert left_out == damaged
    assert "a question of heldout is not asked: heldout, sample" in told
    right = [line["expected"] == word for line in lines]
    assert [line["is_right"] for line in lines] == right
    assert metrics(runs.dir("run"))[0]["accuracy"] == {"heldout": sum(right) / len(right)}
    assert 0 < sum(right) < len(right)


def answering(config: Config, word: str) -> str:
    """Train with a model that says the same to all."""
    ids = load_tokenizer(config.data.tokenizer).encode(f"{word} ")

    def say_it(chunks, batches, *_, max_new_tokens):
        return [ids for batch in batches for _ in batch.sample_ids]

    with mock.patch("triptych.train.hooks.evaluation.greedy", say_it):
        return train(config)


@distributed
def test_a_sheet_that_cannot_be_written_ends_no_run(runs):
    runs.dir("run").mkdir()
    (runs.dir("run") / "evaluation").write_text("in the way")
    told = runs.train("run", "single", "train.num_steps=2", *ASKED)
    assert "AnswerSheet fails and is left out from here on; the run goes on" in told
    assert "accuracy" in metrics(runs.dir("run"))[1]


def test_what_looks_like_a_formula_is_drawn_as_it_is(tmp_path):
    """Matplotlib fails on one that it does not know."""
    sheet = object.__new__(AnswerSheet)
    sheet._shown, sheet._pictures = [0], {0: None}
    question = SimpleNamespace(source="a_$_{", prompt=r"$5 and $ \frac{", expected=r"$\bad")
    answered = Answered(question, r"a $ \foo $ \$")
    sheet._drawn({0: answered}, "step 1").savefig(tmp_path / "sheet.png")

"""Parts that datatrove's tasks prepare, put together, are the dataset of one process."""

import json
import pickle
from pathlib import Path

import pytest

from triptych.data.dataset.dataset_manifest import read_manifest
from triptych.data.prepare.build_block import OnBad
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.prepare.datatrove_step import PrepareStep
from triptych.data.tokenizer import load_tokenizer, train_tokenizer

NUM_SAMPLES, NUM_TASKS = 40, 3
OPTIONS = {"block_size": 200, "on_bad": OnBad.skip}


@pytest.fixture
def work(tmp_path):
    train_tokenizer(["A cat."], tmp_path / "tokenizer", 280)
    lines = [json.dumps({"text": f"cat {i}"}) for i in range(NUM_SAMPLES)]
    lines[7] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    alone = tmp_path / "alone"
    build_dataset([tmp_path / "a.jsonl"], alone, tokenizer, images=[tmp_path], **OPTIONS)
    return tmp_path


def step_in(work: Path) -> PrepareStep:
    return PrepareStep([work / "a.jsonl"], work / "together", work / "tokenizer", **OPTIONS)


def test_tasks_make_their_shares_and_one_alone_the_whole(work):
    step = pickle.loads(pickle.dumps(step_in(work)))
    for rank in (2, 0, 1, 0):  # one of them twice, as after a kill
        assert step(None, rank, NUM_TASKS) is None
        assert not (work / "together").exists()
    step(None, 0, 1)
    assert read_manifest(work / "together") == read_manifest(work / "alone")


def test_the_executors_of_datatrove_run_it(work):
    reason = "the extra datatrove is not installed"
    executors = pytest.importorskip("datatrove.executor", reason=reason)
    steps = [step_in(work)]
    parts = executors.LocalPipelineExecutor(
        steps, tasks=NUM_TASKS, workers=2, logging_dir=str(work / "logs" / "parts")
    )
    whole = executors.LocalPipelineExecutor(
        steps, tasks=1, logging_dir=str(work / "logs" / "whole"), depends=parts
    )
    whole.run()
    assert len(list((work / "logs" / "parts" / "completions").iterdir())) == NUM_TASKS
    assert read_manifest(work / "together") == read_manifest(work / "alone")

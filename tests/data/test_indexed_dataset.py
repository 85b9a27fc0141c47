"""Tokenised documents of megatron-core: read as samples, and read back by its own class."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from triptych.data.dataset.dataset import Dataset
from triptych.data.dataset.text_file import HEADER
from triptych.data.prepare.build_block import OnBad
from triptych.data.prepare.build_dataset import BLOCK_SIZE, build_dataset
from triptych.data.tokenizer import train_tokenizer
from triptych.errors import DataError
from triptych.parallel.megatron_finder import prepare_megatron

DOCUMENTS = [[[20, 21], [22]], [[23, 0]], [[24], [], [25, 0, 26]], [[27, 28, 29, 30]]]
"""Sequences of each; 0 is the end of a text."""
JOINED = [[20, 21, 22, 0], [23, 0], [24, 25, 0, 26, 0], [27, 28, 29, 30, 0]]


@pytest.fixture(scope="module")
def megatron():
    prepare_megatron()
    return import_module("megatron.core.datasets.indexed_dataset")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["A cat."], tmp_path_factory.mktemp("tokenizer"), 280)


def written(megatron, path: Path, documents=DOCUMENTS, dtype=np.int32, **options) -> Path:
    """By megatron's builder; returns the index."""
    builder = megatron.IndexedDatasetBuilder(str(path.with_suffix(".bin")), dtype=dtype, **options)
    for sequences in documents:
        for ids in sequences:
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(path.with_suffix(".idx")))
    return path.with_suffix(".idx")


def prepared(index: Path, output: Path, tokenizer, **options) -> Dataset:
    build_dataset([index], output, tokenizer, images=[index.parent], **options)
    return Dataset.open(output, "documents")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("block_size", [1, 20, BLOCK_SIZE])
def test_documents_become_samples_that_megatron_reads(
    tmp_path, megatron, tokenizer, dtype, block_size
):
    index = written(megatron, tmp_path / "theirs", dtype=dtype)
    dataset = prepared(index, tmp_path / "ours", tokenizer, block_size=block_size)
    samples = [dataset.sample(i) for i in range(len(dataset))]
    assert [sample.input_ids.tolist() for sample in samples] == JOINED
    assert all(sample.targets.all() and not sample.media for sample in samples)
    again = megatron.IndexedDataset(str(tmp_path / "ours" / "text"))
    assert [again[i].tolist() for i in range(len(again))] == JOINED
    assert again.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_what_megatron_reads_is_prepared_to_the_same_bytes(tmp_path, megatron, tokenizer):
    """Our text is an input like any other, so nothing is added or lost on the way."""
    first = prepared(written(megatron, tmp_path / "theirs"), tmp_path / "first", tokenizer)
    again = prepared(first.path / "text.idx", tmp_path / "again", tokenizer)
    assert again.manifest == first.manifest


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def overwrite(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


BOUNDS_AT = HEADER.size + 12 * 7
DAMAGE = {
    "magic": (lambda idx, ids: overwrite(idx, 0, b"X"), "a.idx is not an index in megatron's"),
    "empty": (lambda idx, ids: idx.write_bytes(b""), "a.idx is not an index in megatron's"),
    "version": (lambda idx, ids: overwrite(idx, 9, b"\2"), "version 2 and dtype code 4; version 1"),
    "floats": (lambda idx, ids: overwrite(idx, 17, b"\6"), "version 1 and dtype code 6; version 1"),
    "index cut": (lambda idx, ids: cut(idx, 3), r"a\.idx has \d+ bytes, its index says"),
    "ids cut": (
        lambda idx, ids: cut(ids, 3),
        r"a\.bin has 49 bytes, its index says 52: it was cut",
    ),
    "ids missing": (lambda idx, ids: ids.unlink(), r"a\.bin is missing"),
    "a length": (lambda idx, ids: overwrite(idx, HEADER.size, b"\3"), "do not follow each other"),
    "an offset": (
        lambda idx, ids: overwrite(idx, HEADER.size + 4 * 7 + 8, b"\4"),
        "do not follow each other",
    ),
    "a document": (lambda idx, ids: overwrite(idx, BOUNDS_AT + 8, b"\7"), "do not follow"),
    "the first document": (lambda idx, ids: overwrite(idx, BOUNDS_AT, b"\1"), "do not follow"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, megatron, tokenizer, damage, message):
    index = written(megatron, tmp_path / "a")
    damage(index, index.with_suffix(".bin"))
    with pytest.raises(DataError, match=message):
        prepared(index, tmp_path / "ours", tokenizer, on_bad=OnBad.skip)
    assert not (tmp_path / "ours").exists()


def test_media_that_an_index_speaks_of_are_refused(tmp_path, megatron, tokenizer):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), multimodal=True)
    builder.add_item(torch.tensor([20, 21]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(DataError, match=r"a\.idx is of a multimodal IndexedDataset"):
        prepared(tmp_path / "a.idx", tmp_path / "ours", tokenizer)


def test_whoever_gives_the_ids_is_told_to_give_the_index(tmp_path, megatron, tokenizer):
    index = written(megatron, tmp_path / "a")
    with pytest.raises(DataError, match=r"a\.bin has the ids alone  -> give .*a\.idx"):
        prepared(index.with_suffix(".bin"), tmp_path / "ours", tokenizer)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([20, "size"], "is not from 0 to .*, the tokenizer's  -> give the tokenizer that the ids"),
        ([-1], r"id -1 is not from 0 to"),
        ([20, "image_pad"], "is the placeholder of an image or video, and there is none"),
        ([20, "video_pad"], "is the placeholder of an image or video, and there is none"),
        ([], "a document without text"),
        ([0], "a document without text"),
    ],
)
def test_a_document_that_is_none_is_a_bad_sample(tmp_path, megatron, tokenizer, ids, message):
    tokens = tokenizer.tokens
    named = {"size": tokenizer.vocab_size, "image_pad": tokens.image_pad}
    named |= {"video_pad": tokens.video_pad}
    documents = [[[20]], [[named.get(i, i) for i in ids]], [[21]]]
    index = written(megatron, tmp_path / "a", documents)
    with pytest.raises(DataError, match=rf"a\.idx:2: .*{message}"):
        prepared(index, tmp_path / "ours", tokenizer)
    dataset = prepared(index, tmp_path / "rest", tokenizer, on_bad=OnBad.skip)
    assert [dataset.sample(i).input_ids.tolist() for i in (0, 1)] == [[20, 0], [21, 0]]
    assert dataset.manifest.num_skipped == 1

"""Flipped bits, cuts and replaced files: found before anything is trained on, by file."""

import json
import os
import shutil
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from triptych.data.dataset import block_hashes
from triptych.data.dataset.block_hashes import BLOCK_BYTES, HASHED, CheckedFile
from triptych.data.dataset.dataset import Dataset
from triptych.data.dataset.media_index import ROW, MediaIndex, media_row
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import train_tokenizer
from triptych.data.types import Media, MediaKind
from triptych.errors import DataError
from triptych.launch.prepare import main

SHARD = "shards/000000.tar"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Pictures, and text of several blocks, with one block of targets."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = train_tokenizer(["some words"], folder / "tokenizer", 300)
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with (folder / "in.jsonl").open("w") as lines:
        for number in range(40):
            text = " ".join(map(str, rng.integers(0, 9999, 400)))
            picture = {"type": "image", "image": f"{number % 8}.png"}
            content = [picture, {"type": "text", "text": text}]
            lines.write(json.dumps({"content": content} if number % 2 else {"text": text}) + "\n")
    build_dataset([folder / "in.jsonl"], folder / "set", tokenizer, images=[folder])
    assert (folder / "set/text.bin").stat().st_size > 3 * BLOCK_BYTES
    return folder / "set"


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "set")
    return tmp_path / "set"


def read_all(dataset: Dataset) -> None:
    """Everything that a run trains on."""
    for index in range(len(dataset)):
        for media in dataset.sample(index).media:
            dataset.read_media(media)


def flip(path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        [byte] = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def found(path, dataset: Dataset) -> str:
    """The error that reading ends with, which names the file."""
    with pytest.raises(DataError) as caught:
        read_all(dataset)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("draws", [12, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HASHED)
def test_every_flipped_bit_is_found_before_it_is_trained_on(name, draws, folder):
    """Whether it flips before the dataset is opened or after; hashing the whole file finds it."""
    rng, path = np.random.default_rng(0), folder / name
    before = Dataset.open(folder, "mine")
    for bit in rng.integers(0, 8 * path.stat().st_size, draws).tolist():
        flip(path, bit)
        assert "damaged" in found(path, before)
        with pytest.raises(DataError, match="damaged"):
            read_all(Dataset.open(folder, "mine"))
        with pytest.raises(DataError, match="damaged"):
            before.verify()
        flip(path, bit)
        read_all(before)


@pytest.mark.parametrize("draws", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_a_shard_is_found(draws, folder):
    """What is trained on as it is read; the rest, headers among it, where all is hashed."""
    dataset, path = Dataset.open(folder, "mine"), folder / SHARD
    media = [item for i in range(len(dataset)) for item in dataset.sample(i).media]
    trained_on = 0
    for bit in np.random.default_rng(1).integers(0, 8 * path.stat().st_size, draws).tolist():
        flip(path, bit)
        if any(m.offset <= bit // 8 < m.offset + m.size for m in media):
            found(path, dataset)
            trained_on += 1
        with pytest.raises(DataError, match=r"000000\.tar is damaged"):
            dataset.verify()
        flip(path, bit)
    assert trained_on > draws / 2


@pytest.mark.parametrize("draws", [3, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*HASHED, SHARD])
def test_a_file_that_is_cut_under_a_run_ends_it_by_name(name, draws, folder):
    """No SIGBUS. Opened again, its size tells."""
    path = folder / name
    content, dataset = path.read_bytes(), Dataset.open(folder, "mine")
    read_all(dataset)
    for size in np.random.default_rng(2).integers(0, len(content) // 2, draws).tolist():
        os.truncate(path, size)
        assert "it was cut" in found(path, dataset)
        with pytest.raises(DataError, match="it was cut or mixed up"):
            Dataset.open(folder, "mine")
        path.write_bytes(content)
    read_all(dataset)


@pytest.mark.parametrize("name", HASHED)
def test_another_file_of_the_same_size_is_found(name, folder):
    path = folder / name
    path.write_bytes(np.random.default_rng(3).bytes(path.stat().st_size))
    with pytest.raises(DataError, match=f"{name} is damaged"):
        read_all(Dataset.open(folder, "mine"))


def test_hashes_that_are_missing_or_damaged_are_made_again(folder, monkeypatch):
    """From files that are those of dataset.yaml, or not at all."""
    [hashes] = (folder / "sizes").glob("*.blocks")
    content = hashes.read_bytes()
    for damage in (hashes.unlink, lambda: os.truncate(hashes, 5000), lambda: flip(hashes, 100)):
        damage()
        read_all(Dataset.open(folder, "mine"))
        assert hashes.read_bytes() == content
    flip(hashes, 8 * len(content) - 1)
    with pytest.raises(DataError, match=r"media.idx is damaged.*, or sizes/\*\.blocks is"):
        read_all(Dataset.open(folder, "mine"))
    hashes.unlink()
    flip(folder / "text.bin", 77)
    with pytest.raises(DataError, match=r"text\.bin is damaged: its xxh3-128"):
        Dataset.open(folder, "mine")
    flip(folder / "text.bin", 77)
    monkeypatch.setattr(block_hashes, "read_or_make", lambda paths, read, write: None)
    dataset = Dataset.open(folder, "mine")  # where no folder can be written
    read_all(dataset)
    flip(folder / "text.bin", 77)
    found(folder / "text.bin", dataset)


@pytest.mark.parametrize("start_ms", [0, 1, 0xFFFF, 0x10000, 0xFFFFFF])
def test_a_row_has_room_for_where_a_clip_begins(start_ms, tmp_path):
    """Without a clip it is the row of before, which had the kind in the last four bytes."""
    media = Media(MediaKind.VIDEO, 7, 512, 99, b"x" * 16, 640, 480, 30, 1000, start_ms)
    row = media_row(0, media).tobytes()
    assert row[60:] == bytes([1, start_ms >> 16, start_ms & 255, start_ms >> 8 & 255])
    (tmp_path / "media.idx").write_bytes(row)
    index = MediaIndex(CheckedFile(tmp_path / "media.idx", 64, None), 1)
    assert index.of_sample(0) == (media,)


@pytest.mark.parametrize("per_sample", [0.3, 1.0, 40.0])
def test_media_are_found_by_sample_over_many_blocks(per_sample, tmp_path):
    rng = np.random.default_rng(4)
    rows = np.zeros(5000, dtype=ROW)
    rows["sample"] = np.sort(rng.integers(0, int(5000 / per_sample), 5000))
    rows["offset"] = np.arange(5000)
    path = tmp_path / "media.idx"
    path.write_bytes(rows.tobytes())
    index = MediaIndex(CheckedFile(path, path.stat().st_size, None), 5000)
    last = int(rows["sample"][-1])
    bounds = [0, *np.sort(rng.integers(0, last + 1, 60)).tolist(), last + 1, last + 9]
    spans = [*pairwise(bounds), (0, last + 9)]
    spans += [(s, s + 1) for s in rows["sample"][[0, 1023, 1024, 1025, 2048, 4999]].tolist()]
    for start, end in spans:
        here = (rows["sample"] >= start) & (rows["sample"] < end)
        assert index.rows_of(start, end)["offset"].tolist() == rows["offset"][here].tolist()


def test_the_command_names_every_file_that_differs(folder, capsys):
    main(["verify", str(folder)])
    assert "set: all 5 files are as they were prepared" in capsys.readouterr().out
    flip(folder / SHARD, 9)
    flip(folder / "loss.bin", 9)
    with pytest.raises(DataError, match=r"loss\.bin is damaged(.|\n)*000000\.tar is damaged"):
        main(["verify", str(folder)])
    with pytest.raises(DataError, match="is no dataset"):
        main(["verify", str(folder.parent)])

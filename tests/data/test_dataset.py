"""The dataset folder: megatron's text format, the media index, and what is refused."""

import json
from dataclasses import asdict
from importlib import import_module

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from triptych.configs.model_schema import ModelConfig, TokensConfig, VisionConfig
from triptych.data.dataset.block_hashes import CheckedFile
from triptych.data.dataset.dataset import Dataset
from triptych.data.dataset.media_index import MediaIndex, media_grids, media_row
from triptych.data.dataset.text_file import TextFile, TextWriter
from triptych.data.hashed_files import hash_file
from triptych.data.media.image import image_grids
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.stores import retrying
from triptych.data.tokenizer import train_tokenizer
from triptych.data.tokens import encode_record, expand
from triptych.data.types import Media, MediaKind, PixelLimits
from triptych.errors import DataError, StorageError
from triptych.parallel.megatron_finder import prepare_megatron

VISION = VisionConfig()
LIMITS = PixelLimits(min_pixels=28 * 28, max_pixels=20 * 28 * 28)
LARGE = PixelLimits(min_pixels=100 * 28 * 28, max_pixels=400 * 28 * 28)


def opened(file) -> CheckedFile:
    """A file outside a dataset, of which no hashes are known."""
    return CheckedFile(file, file.stat().st_size, None)


def text_file(stem) -> TextFile:
    return TextFile(opened(stem.with_suffix(".idx")), opened(stem.with_suffix(".bin")))


def write_text(stem, samples) -> None:
    writer = TextWriter(stem)
    for ids in samples:
        writer.append(np.array(ids, dtype=np.int32))
    writer.close()


SAMPLES = [[5, 6, 7], [], [-1, 2**31 - 1], [8]]


@pytest.fixture(scope="module")
def megatron():
    prepare_megatron()
    return import_module("megatron.core.datasets.indexed_dataset")


def test_megatron_reads_what_we_write(tmp_path, megatron):
    write_text(tmp_path / "text", SAMPLES)
    theirs = megatron.IndexedDataset(str(tmp_path / "text"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == SAMPLES
    assert theirs.sequence_lengths.tolist() == [3, 0, 2, 1]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_we_read_what_megatron_writes_and_write_the_same_bytes(tmp_path, megatron):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for ids in SAMPLES:
        builder.add_item(torch.tensor(ids, dtype=torch.int32))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    text = text_file(tmp_path / "theirs")
    assert [text.ids(text.span(i)).tolist() for i in range(len(text))] == SAMPLES
    assert text.num_tokens == 6
    write_text(tmp_path / "ours", SAMPLES)
    for kind in ("bin", "idx"):
        theirs = (tmp_path / f"theirs.{kind}").read_bytes()
        assert (tmp_path / f"ours.{kind}").read_bytes() == theirs


def test_an_empty_text_file_can_be_read(tmp_path):
    write_text(tmp_path / "text", [])
    assert len(text_file(tmp_path / "text")) == 0


def cut(file, num_bytes: int = 1) -> None:
    file.write_bytes(file.read_bytes()[:-num_bytes])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "text.bin"), "text.bin has 23 bytes, its index says 24"),
        (lambda f: cut(f / "text.idx"), "text.idx has 121 bytes, its index says 122"),
        (lambda f: (f / "text.idx").write_bytes(b"MMIDIDX"), "not an index in megatron's"),
        (lambda f: (f / "text.idx").write_bytes(bytes(200)), "not an index in megatron's"),
        (
            lambda f: (f / "text.idx").write_bytes(b"MMIDIDX\0\0\1\0\0\0\0\0\0\0\x08" + bytes(99)),
            "dtype code 8",
        ),
    ],
)
def test_damaged_text_is_refused(tmp_path, damage, message):
    write_text(tmp_path / "text", SAMPLES)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        text_file(tmp_path / "text")


def test_media_rows_keep_every_field(tmp_path):
    video = Media(MediaKind.VIDEO, 3, 2**40, 2**35, b"\0" * 8 + b"ab\0\0" * 2, 1920, 1080, 60, 2000)
    image = Media(MediaKind.IMAGE, 0, 512, 9, bytes(16), 28, 29)
    rows = [media_row(sample, m).tobytes() for sample, m in [(0, image), (2, video), (2, image)]]
    (tmp_path / "media.idx").write_bytes(b"".join(rows))
    index = MediaIndex(opened(tmp_path / "media.idx"), 3)
    assert [index.of_sample(i) for i in range(4)] == [(image,), (), (video, image), ()]
    rows = index.rows_of(0, 3).copy()
    assert media_grids(rows, LIMITS, VISION).tolist() == [[1, 2, 2], [2, 40, 72], [1, 2, 2]]
    rows["kind"][1] = 7
    with pytest.raises(DataError, match="no media kind 7: the index is damaged"):
        media_grids(rows, LIMITS, VISION)
    with pytest.raises(DataError, match="192 bytes, its index says 256"):
        MediaIndex(opened(tmp_path / "media.idx"), 4)


RECORDS = [
    {"text": "Plain text."},
    {"content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "A picture."}]},
    {"text": "More text."},
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "1.jpg"},
                    {"type": "image", "image": "0.png"},
                    {"type": "text", "text": "Which is larger?"},
                ],
            },
            {"role": "assistant", "content": "The first."},
        ]
    },
]
SIZES = {"0.png": (40, 70), "1.jpg": (300, 200)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["some text"], tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture
def folder(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    build_dataset([lines], tmp_path / "set", tokenizer, images=[tmp_path])
    return tmp_path / "set"


def test_samples_come_back_as_they_were_encoded(folder, tokenizer):
    dataset = Dataset.open(folder, "mine")
    dataset.verify()
    dataset.check_tokens(tokenizer.tokens, tokenizer.fingerprint)
    assert len(dataset) == 4
    for i, record in enumerate(RECORDS):
        encoded, sample = encode_record(record, tokenizer), dataset.sample(i)
        assert sample.input_ids.tolist() == encoded.input_ids.tolist()
        assert sample.targets.tolist() == encoded.targets.tolist()
        assert (sample.input_ids.dtype, sample.targets.dtype) == (np.int32, np.uint8)
        assert [(m.height, m.width) for m in sample.media] == [SIZES[m.path] for m in encoded.media]
        for media, ref in zip(sample.media, encoded.media, strict=True):
            assert dataset.read_media(media) == (folder.parent / ref.path).read_bytes()
    with pytest.raises(IndexError):
        dataset.sample(4)
    with pytest.raises(IndexError):
        dataset.sample(-1)


@pytest.mark.parametrize("limits", [LIMITS, LARGE], ids=["small", "large"])
def test_counts_from_the_index_equal_expanded_samples(folder, tokenizer, limits):
    dataset = Dataset.open(folder, "mine")
    sizes = dataset.sizes(limits, VISION)
    tokens, patches, pairs = sizes.num_tokens, sizes.num_patches, sizes.num_patch_pairs
    assert {counts.dtype for counts in (tokens, patches, pairs)} == {np.dtype(np.int64)}
    for i in range(len(dataset)):
        sample = dataset.sample(i)
        grids = [
            image_grids([m.height], [m.width], limits, VISION)[0].tolist() for m in sample.media
        ]
        ids, targets = expand(sample, grids, ModelConfig(tokens=tokenizer.tokens))
        assert len(ids) == len(targets) == tokens[i]
        assert patches[i] == sum(t * h * w for t, h, w in grids)
        assert pairs[i] == sum(t * (h * w) ** 2 for t, h, w in grids)


def test_no_targets_on_vision_tokens(folder, tokenizer):
    sample = Dataset.open(folder, "mine").sample(1)
    special = tokenizer.tokens
    vision = [special.vision_start, special.image_pad, special.vision_end]
    assert not sample.targets[np.isin(sample.input_ids, vision)].any()
    assert sample.targets.sum() == len(sample.input_ids) - 3


def flip(file, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_in_an_image_names_shard_and_byte(folder):
    dataset = Dataset.open(folder, "mine")
    first, second = dataset.sample(3).media
    flip(folder / "shards/000000.tar", second.offset + 5)
    assert dataset.read_media(first)
    with pytest.raises(DataError, match=rf"image at byte {second.offset} of .*000000\.tar"):
        dataset.read_media(second)
    with pytest.raises(DataError, match=r"000000\.tar is damaged"):
        dataset.verify()


def test_a_shard_that_is_cut_or_lost_under_a_run(folder, monkeypatch):
    dataset = Dataset.open(folder, "mine")
    media = dataset.sample(3).media[-1]
    shard = folder / "shards/000000.tar"
    shard.write_bytes(shard.read_bytes()[: media.offset + 5])
    with pytest.raises(DataError, match=r"000000\.tar ends at byte .* it was cut"):
        dataset.read_media(media)
    monkeypatch.setattr(retrying, "PAUSES_S", (0.0, 0.0))
    shard.unlink()
    with pytest.raises(StorageError, match=r"000000\.tar cannot be read: No such file.* resumes"):
        dataset.read_media(media)


def test_a_file_system_that_comes_back_is_waited_for(folder, monkeypatch):
    dataset = Dataset.open(folder, "mine")
    media = dataset.sample(3).media[-1]
    expected = dataset.read_media(media)
    shards, away = folder / "shards", folder / "away"
    shards.rename(away)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            away.rename(shards)

    monkeypatch.setattr(retrying.time, "sleep", wait)
    assert dataset.read_media(media) == expected
    assert waits == list(retrying.PAUSES_S[:2])


def edit_manifest(folder, **changes) -> None:
    file = folder / "dataset.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "dataset.yaml").unlink(), "is no dataset: dataset.yaml is missing"),
        (lambda f: (f / "dataset.yaml").write_text(""), "dataset.yaml is damaged"),
        (lambda f: (f / "dataset.yaml").write_text("a: ["), "dataset.yaml is damaged"),
        (lambda f: edit_manifest(f, version=9), "format version 9; this is triptych for version 1"),
        (lambda f: edit_manifest(f, num_samples=0), "is empty: it has no samples"),
        (lambda f: edit_manifest(f, surprise=0), "dataset.yaml is damaged"),
        (lambda f: (f / "text.bin").unlink(), "text.bin is missing"),
        (lambda f: (f / "text.idx").unlink(), "text.idx is missing"),
        (lambda f: cut(f / "text.bin"), "text.bin has"),
        (lambda f: cut(f / "loss.bin"), "loss.bin has"),
        (lambda f: cut(f / "media.idx"), "media.idx has"),
        (lambda f: cut(f / "shards/000000.tar"), "000000.tar has"),
        (lambda f: (f / "shards/000000.tar").unlink(), "000000.tar is missing"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        Dataset.open(folder, "mine")


def test_placeholders_that_are_not_as_many_as_media_are_refused(folder, tokenizer):
    ids = np.fromfile(folder / "text.bin", dtype=np.int32)
    ids[0] = tokenizer.tokens.image_pad
    ids.tofile(folder / "text.bin")
    files = yaml.safe_load((folder / "dataset.yaml").read_text())["files"]
    edit_manifest(folder, files=files | {"text.bin": asdict(hash_file(folder / "text.bin"))})
    dataset = Dataset.open(folder, "mine")
    with pytest.raises(DataError, match="sample 0: 1 placeholders in the text, 0 media items"):
        dataset.sample(0)


def test_another_tokenizer_or_model_is_refused(folder, tokenizer):
    dataset = Dataset.open(folder, "mine")
    with pytest.raises(DataError, match=r"was prepared with tokenizer .* the run has abc"):
        dataset.check_tokens(tokenizer.tokens, "abc")
    with pytest.raises(DataError, match=r"image_pad=151655 \(dataset: 12\)"):
        dataset.check_tokens(TokensConfig(), tokenizer.fingerprint)

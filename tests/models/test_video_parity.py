"""A video from its file to the loss: prepare, loader and our model against transformers."""

import json
import shutil
import sys
from contextlib import closing

import numpy as np
import pytest
import torch

from triptych.configs.schema import DataConfig, VideoConfig
from triptych.data.batch import Batch, Step
from triptych.data.dataset.dataset import Dataset
from triptych.data.loading.reader import BatchFormat, Reader
from triptych.data.media import decoder
from triptych.data.media.decoder import VideoDecoder
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import train_tokenizer
from triptych.data.types import Pack, PixelLimits, SampleId
from triptych.tests.helpers.reference import (
    BAR,
    TOKENS,
    Conversation,
    distance,
    run_reference,
    save_reference,
    small_model,
    transformers_model,
)
from triptych.tests.helpers.single import alone, load_ours, run_ours
from triptych.tests.helpers.videos import transformers_patches, video

LIMITS = PixelLimits.of(
    DataConfig(video=VideoConfig(min_pixels=784, max_pixels=12 * 784, max_tokens=64))
)
MODEL = small_model(heads=4, kv_heads=2, tied=False, vocab_size=320)
FILES = {
    "a.mp4": {"num_frames": 50, "width": 84, "height": 112},
    "b.mp4": {"num_frames": 61, "width": 90, "height": 60, "rate": 20},
}
"""Grids (2, 8, 6) and (3, 4, 6): no longer than wide, where transformers' positions are right."""


def question(*names: str) -> dict[str, object]:
    content: list[dict[str, str]] = [{"type": "text", "text": "See: "}]
    for name in names:
        content += [{"type": "video", "video": name}, {"type": "text", "text": "then"}]
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "moving shades"},
        ]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files and a dataset: one video, the other, both, and text."""
    folder = tmp_path_factory.mktemp("videos")
    for name, options in FILES.items():
        (folder / name).write_bytes(video(**options))
    records = [question("a.mp4"), question("b.mp4"), question(*FILES), {"text": "shades"}]
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = train_tokenizer(["moving shades"], folder / "tokenizer", 300)
    assert tokenizer.tokens == TOKENS
    build_dataset([folder / "in.jsonl"], folder / "set", tokenizer, images=[folder])
    return folder


def read(dataset: Dataset) -> Step:
    """All samples in one pack, by the loader's reader."""
    sizes = dataset.sizes(LIMITS, MODEL.vision)
    ids = tuple(SampleId(0, i) for i in range(len(dataset)))
    form = BatchFormat(model=MODEL, limits=LIMITS, pad_to=1, read_pixels=True, pin_memory=False)
    with closing(Reader([dataset], form, num_workers=2)) as reader:
        return reader.read([[Pack(0, ids, sizes.num_tokens.sum(), sizes.num_patches.sum())]])


@pytest.fixture(scope="module")
def batch(folder) -> Batch:
    step = read(Dataset.open(folder / "set", "videos"))
    assert step.unreadable == []
    return step.microbatches[0]


def conversations(folder) -> list[Conversation]:
    """The samples as transformers would have them: its patches, its number of placeholders."""
    dataset = Dataset.open(folder / "set", "videos")
    of_files = {
        name: transformers_patches(
            folder / name, LIMITS.video, MODEL.vision, LIMITS.video.max_pixels
        )
        for name in FILES
    }
    samples = []
    for number, names in enumerate((["a.mp4"], ["b.mp4"], [*FILES], [])):
        stored = dataset.sample(number)
        repeats = np.ones(len(stored.input_ids), dtype=np.int64)
        grids = [of_files[name][1] for name in names]
        repeats[stored.input_ids == TOKENS.video_pad] = [np.prod(grid) // 4 for grid in grids]
        samples.append(
            Conversation(
                np.repeat(stored.input_ids, repeats),
                np.repeat(stored.targets, repeats),
                [tuple(grid) for grid in grids],
                np.concatenate(
                    [np.zeros((0, 1176), np.uint8), *(of_files[name][0] for name in names)]
                ),
            )
        )
    return samples


def test_the_way_of_a_video_to_the_loss_equals_transformers(folder, batch, tmp_path, capsys):
    """Its sampling, sizes, patches, positions; two videos in one sample, and text beside them."""
    samples = conversations(folder)
    assert batch.grid_thw.tolist() == [list(grid) for s in samples for grid in s.grids]
    reference = transformers_model(MODEL, seed=0)
    theirs = run_reference(reference, samples)
    with alone() as mesh:
        ours = run_ours(load_ours(save_reference(reference, tmp_path), MODEL, mesh), batch, MODEL)
    measured = distance(ours, theirs)
    with capsys.disabled():
        print(f"\nvideos: {measured}")
    assert measured.times(BAR).largest <= 1


def test_positions_in_a_pack_equal_those_of_transformers(folder, batch):
    reference = transformers_model(MODEL, seed=0).model
    for number, sample in enumerate(conversations(folder)):
        ids = torch.tensor(sample.input_ids[None].astype(np.int64))
        start, end = batch.segments[number], batch.segments[number + 1]
        assert batch.input_ids[start:end].tolist() == ids[0].tolist()
        theirs, _ = reference.get_rope_index(
            ids,
            2 * (ids == TOKENS.video_pad).int(),
            video_grid_thw=torch.tensor(sample.grids) if sample.grids else None,
        )
        assert torch.equal(batch.position_ids[:, start:end], theirs[:, 0])


def test_frames_of_a_pair_see_only_each_other(batch):
    """A segment of the ViT is one pair of frames, as in Qwen2-VL."""
    pairs = [h * w for t, h, w in batch.grid_thw.tolist() for _ in range(t)]
    assert pairs == [48, 48, 24, 24, 24] * 2
    assert np.diff(batch.patches.frames.bounds).tolist() == pairs
    assert batch.workload.patch_pairs == sum(count**2 for count in pairs)


def flipped(folder, number_of_bits: int):
    """The dataset with that many bits of its first video flipped, in a copy."""
    copy = folder / "flipped"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "set", copy)
    first = Dataset.open(folder / "set", "x").sample(0).media[0]
    shard = copy / "shards" / "000000.tar"
    content = bytearray(shard.read_bytes())
    for place in np.random.default_rng(0).integers(0, first.size, number_of_bits).tolist():
        content[first.offset + place] ^= 1 << (place % 8)
    shard.write_bytes(content)
    return Dataset.open(copy, "flipped")


@pytest.mark.parametrize("number_of_bits", [1, 200])
def test_flipped_bytes_are_found_by_their_hash_before_they_are_decoded(folder, number_of_bits):
    """The sample is named and its pixels are zeros; the others are as they were."""
    step = read(flipped(folder, number_of_bits))
    (bad,) = step.unreadable
    assert bad.segment == 0
    assert "is damaged: its xxh3-128 is not the recorded one" in bad.reason
    pixels = step.microbatches[0].pixel_values
    assert not pixels[:96].any()
    assert pixels[96:].any()


def test_a_video_that_crashes_the_decoder_is_a_bad_sample_of_the_step(folder):
    decoder._kill_idle()
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    decoder._idle.append(VideoDecoder([sys.executable, "-c", crash]))
    step = read(Dataset.open(folder / "set", "videos"))
    (bad,) = step.unreadable
    assert "videos, sample" in bad.reason
    assert "video 0: cannot be decoded as a video: it ended the decoder by signal" in bad.reason

"""Pictures of samples and packs: text, targets, positions and pixels are those of the batch."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

import triptych
from triptych.configs.compose import load_config
from triptych.configs.model_schema import VisionConfig
from triptych.data.digits.make import make_digits
from triptych.data.media.image import cut_patches
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import SYSTEM_PROMPT, train_tokenizer
from triptych.errors import ConfigError, DataError
from triptych.launch import prepare
from triptych.launch.inspection.chosen import read_samples
from triptych.launch.inspection.drawing import BAR, MEDIA, OTHER, TARGET
from triptych.launch.inspection.segment_view import join_patches, segment_views

ROOT = Path(triptych.__file__).parent
GOLDEN = json.loads((ROOT / "tests/data/golden_examples.json").read_text())
CHATS = [name for name, text in GOLDEN.items() if text.startswith("<|im_start|>")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The examples that are chats, in ``ex``, and their tokenizer, in ``tokenizer``."""
    path = tmp_path_factory.mktemp("inspect")
    tokenizer = train_tokenizer([SYSTEM_PROMPT, "The disc is red."], path / "tokenizer", 300)
    examples = ROOT / "docs/examples"
    inputs = [examples / f"{name}.jsonl" for name in CHATS]
    build_dataset(inputs, path / "ex", tokenizer, images=[examples])
    return path


@pytest.fixture(scope="module")
def words(folder):
    return [f"data.tokenizer={folder}/tokenizer"]


@pytest.fixture(scope="module")
def views(folder, words):
    config = load_config(words)
    chosen = read_samples(folder / "ex", range(len(CHATS)), config)
    return segment_views(chosen.batch, config.model, chosen.tokenizer)


@pytest.mark.parametrize(("num_frames", "depth", "merge"), [(2, 2, 2), (6, 2, 1), (6, 3, 3)])
def test_patches_are_put_together_as_they_were_cut(num_frames, depth, merge):
    vision = VisionConfig(patch_size=4, temporal_patch_size=depth, spatial_merge_size=merge)
    height, width = 4 * merge * 2, 4 * merge * 3
    shape = (num_frames, 3, height, width)
    frames = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    grid = (num_frames // depth, height // 4, width // 4)
    joined = join_patches(cut_patches(frames, vision), grid, vision)
    assert np.array_equal(joined, frames.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", CHATS)
def test_pieces_are_the_text_and_its_targets(views, name):
    view = views[CHATS.index(name)]
    told = [(re.sub(r" x \d+$", "", p.text) if p.is_media else p.text) for p in view.pieces]
    expected = re.split(r"\[\[|\]\]", GOLDEN[name])
    assert "".join(told) == "".join(expected)
    targets = [text for text, piece in zip(told, view.pieces, strict=True) if piece.is_target]
    assert "".join(targets) == "".join(expected[1::2])


def test_positions_follow_the_media(views):
    """By hand: 112x84 pixels are 4x3 tokens, 4 frames are 2 pairs; text resumes at the largest."""
    pieces = views[CHATS.index("video_qa")].pieces
    (i,) = (i for i, piece in enumerate(pieces) if piece.is_media)
    begin = int(pieces[i - 1].positions) + 1
    assert pieces[i].text == "<|video_pad|> x 24"
    assert pieces[i].positions == (
        f"t {begin}-{begin + 1} h {begin}-{begin + 2} w {begin}-{begin + 3}"
    )
    assert pieces[i + 1].positions == str(begin + 4)


def test_frames_are_as_resized(views):
    (picture,) = views[CHATS.index("vqa")].media
    with Image.open(ROOT / "docs/examples/shapes.png") as original:
        assert np.array_equal(picture[0], original.convert("RGB").resize(picture.shape[2:0:-1]))
    (clip,) = views[CHATS.index("video_qa")].media
    red = (clip[..., 0] > 200) & (clip[..., 2] < 100)
    middles = [np.nonzero(frame)[1].mean() for frame in red]
    assert np.abs(np.diff(middles) - 4 * 80 / 15).max() < 2  # 16 frames over 80 pixels, each 4th


def colours(file):
    with Image.open(file) as image:
        return {colour for _, colour in image.getcolors(1 << 24)}


def test_samples_are_drawn(folder, words, tmp_path, capsys):
    output = tmp_path / "a.png"
    number = CHATS.index("video_dialogue")
    args = ["inspect", str(folder / "ex"), "--sample", f"0,{number}", *words]
    prepare.main([*args, "--output", str(output)])
    assert {ImageColor.getrgb(name) for name in (TARGET, OTHER, MEDIA, BAR)} <= colours(output)
    assert (255, 0, 0) in {tuple(c // 250 * 255 for c in rgb) for rgb in colours(output)}
    assert f"{output}: 2 samples" in capsys.readouterr().out


def test_a_pack_of_the_plan_is_drawn(tmp_path, capsys):
    make_digits(tmp_path / "data", num_images=30, num_samples=30)
    output = tmp_path / "a.png"
    words = [f"data.root={tmp_path}/data", "stage=2", "train.seq_len=512"]
    prepare.main(["inspect", "--pack", "1", *words, "--output", str(output)])
    assert re.search(r"a.png: \d+ samples, (4\d\d|50\d|51[0-2]) tokens", capsys.readouterr().out)
    assert ImageColor.getrgb(TARGET) in colours(output)


def test_what_cannot_be_read_is_told(folder, words, tmp_path, capsys):
    name = "000000.tar"
    broken = tmp_path / "broken"
    (broken / "shards").mkdir(parents=True)
    for file in (folder / "ex").glob("*.*"):
        (broken / file.name).write_bytes(file.read_bytes())
    data = (folder / "ex/shards" / name).read_bytes()
    (broken / "shards" / name).write_bytes(data.replace(b"IHDR", b"ihdr"))
    output = tmp_path / "a.png"
    prepare.main(["inspect", str(broken), *words, "--output", str(output)])
    assert "segment 0 is black, and left out of a run" in capsys.readouterr().out
    assert (0, 0, 0) in colours(output)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--sample", "99"], DataError, "has samples 0 to .*; there is no 99"),
        (["--output", "a.gif"], ConfigError, r"must end in \.png, \.jpg or \.webp"),
        (["--output", "nowhere/a.png"], ConfigError, "nowhere is no folder"),
        (["data.min_pixels=0"], ConfigError, "data.min_pixels"),
        (["data.tokenizer=nowhere"], ConfigError, "nowhere is no folder"),
        (["--pack", "0"], SystemExit, "2"),
        (["--sample", "-1"], SystemExit, "2"),
        (["--sample", "x"], SystemExit, "2"),
    ],
)
def test_what_cannot_be_drawn_is_refused(folder, words, args, error, message):
    with pytest.raises(error, match=message):
        prepare.main(["inspect", str(folder / "ex"), *words, *args])


@pytest.mark.parametrize("args", [[], ["--pack", "0", "--sample", "0"]])
def test_one_thing_is_drawn(args):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["inspect", *args])

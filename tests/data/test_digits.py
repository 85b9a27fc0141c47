"""The sample data: what the demo may claim of it, checked."""

import itertools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from triptych.configs.compose import load_config
from triptych.configs.model_schema import VisionConfig
from triptych.data.dataset.dataset import Dataset
from triptych.data.digits import images
from triptych.data.digits.images import (
    MAX_SIDE,
    MIN_SIDE,
    UNSEEN_GRIDS,
    heldout_images,
    load_scans,
    training_images,
)
from triptych.data.digits.make import have_digits, make_digits
from triptych.data.digits.texts import READ, SOURCES
from triptych.data.media.decoder import borrowed_decoder
from triptych.data.media.image import image_grids
from triptych.data.tokenizer import load_tokenizer
from triptych.data.types import PixelLimits
from triptych.errors import DataError
from triptych.tests.helpers.processes import wait_until_dead
from triptych.train.data import Mixture

LIMITS = PixelLimits.of(load_config([]).data)
SIZES = {"num_images": 40, "num_samples": 60, "seed": 7}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "sample"
    make_digits(folder, **SIZES)
    return folder


def test_training_and_heldout_scans_are_different_ones():
    train, heldout = load_scans()
    assert len(train.digits) == 1400
    assert len(heldout.digits) == 397
    assert not {s.tobytes() for s in train.images} & {s.tobytes() for s in heldout.images}


@pytest.mark.parametrize("images", [training_images, heldout_images])
def test_sizes_and_shares(images):
    made = list(images(400, 0))
    assert sum(len(m.answer) == 2 for m in made) == 200
    unseen = [m.size_is_unseen for m in made]
    assert sum(unseen) == (0 if images is training_images else 100)
    for m in made:
        width, height = m.image.size
        assert MIN_SIDE <= min(width, height) <= max(width, height) <= MAX_SIDE
        _, rows, columns = image_grids([height], [width], LIMITS, VisionConfig())[0]
        assert ((rows // 2, columns // 2) in UNSEEN_GRIDS) == m.size_is_unseen
    sides = {side for m in made for side in m.image.size}
    assert sum(side % 28 != 0 for side in sides) > 50


def test_digits_neither_overlap_nor_leave_the_picture(monkeypatch):
    """Drawn as full boxes of two brightnesses, both digits keep every pixel and their order."""
    marked = iter(itertools.cycle([200, 250]))
    boxes = []

    def draw(scan, height, width, rng):
        boxes.append((int(height), int(width), next(marked)))
        return np.full((height, width), boxes[-1][2], dtype=np.uint8)

    monkeypatch.setattr(images, "_scale", draw)
    rng = np.random.default_rng(5)
    for _ in range(300):
        boxes.clear()
        made = images.compose(rng, load_scans()[0], 2, unseen_size=False)
        pixels = np.asarray(made.image)
        (_, first), (_, second) = (np.nonzero(pixels == mark) for _, _, mark in boxes)
        assert [len(first), len(second)] == [h * w for h, w, _ in boxes]
        assert first.max() < second.min()


def test_pictures_are_those_of_the_seed():
    def pixels(seed):
        return [m.image.tobytes() + m.answer.encode() for m in training_images(5, seed)]

    assert pixels(1) == pixels(1)
    assert not set(pixels(1)) & set(pixels(2))


def test_every_source_is_a_dataset_with_short_samples(root):
    tokenizer = load_tokenizer(root / "tokenizer")
    assert tokenizer.vocab_size <= 512
    for name in (*SOURCES, "every_kind"):
        dataset = Dataset.open(root / name, name)
        dataset.check_tokens(tokenizer.tokens, tokenizer.fingerprint)
        assert len(dataset) == (8 if name in {"heldout", "every_kind"} else 60)
        assert dataset.sizes(LIMITS, VisionConfig()).num_tokens.max() <= 128
        assert (dataset.manifest.num_media == 0) == name.startswith("text")


def test_answers_are_what_the_pictures_show_and_only_digits(root):
    answers = {}
    for line in (root / "raw/chat.jsonl").read_text().splitlines():
        *_, question, answer = json.loads(line)["messages"]
        assert answer["content"].isdigit()
        if question["content"][-1]["text"] == READ:
            answers.setdefault(question["content"][0]["image"], set()).add(answer["content"])
    assert answers
    assert all(len(said) == 1 for said in answers.values())
    made = list(training_images(SIZES["num_images"], SIZES["seed"]))
    assert all(said == {made[int(path[-10:-4])].answer} for path, said in answers.items())


def test_every_kind_is_what_its_records_say(root):
    """A video of three digits, a place in a picture, a tap and what comes of it, an article."""
    lines = (root / "raw/every_kind.jsonl").read_text().splitlines()
    video, place, agent, article = map(json.loads, lines[:4])
    assert len(lines) == 8
    file = root / "raw" / video["messages"][0]["content"][0]["video"]
    with borrowed_decoder() as decoder:
        assert decoder.extent(file.read_bytes(), "")["duration_ms"] == 3000
    assert len(video["messages"][-1]["content"]) == 3
    [picture, _, asked, _], [answered, box] = (m["content"] for m in place["messages"])
    assert asked == answered
    pixels = np.asarray(Image.open(root / "raw" / picture["image"]))
    left, top, right, bottom = (84 * corner // 1000 for corner in box["box"])
    inside, outside = pixels[top : bottom + 1, left : right + 1], pixels.copy()
    outside[top : bottom + 1, left : right + 1] = 0
    assert min(inside.max(), outside.max()) > 200, "a digit there, the other elsewhere"
    assert [turn["role"] for turn in agent["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert sum(part["type"] == "image" for part in article["content"]) == 3
    dataset, tokens = (
        Dataset.open(root / "every_kind", "every_kind"),
        load_tokenizer(root / "tokenizer"),
    )
    texts = [tokens.decode(dataset.sample(i).input_ids.tolist()) for i in range(4)]
    for text, told in zip(
        texts, ("<|video_pad|>", "<|box_start|>(", "✿ARGS✿", "<|endoftext|>"), strict=True
    ):
        assert told in text


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_default_run_trains_on_every_kind(stage, root):
    config = load_config([f"stage={stage}", f"data.root={root}"])
    mixture = Mixture.open(config, config.data.mixtures[f"stage{stage}"])
    number = [source.name for source in mixture.sources].index("every_kind")
    packs = mixture.plan.first_packs(config.train.num_steps * config.train.global_batch_size)
    seen = {sample.index for pack in packs for sample in pack.samples if sample.source == number}
    assert seen == set(range(8))


def test_the_tokenizer_does_not_depend_on_sizes_or_seed(root, tmp_path):
    make_digits(tmp_path / "other", num_images=8, num_samples=8, seed=1)
    ours, other = (load_tokenizer(folder / "tokenizer") for folder in (root, tmp_path / "other"))
    assert ours.fingerprint == other.fingerprint


def test_processes_share_the_work_and_change_no_byte(root, tmp_path):
    shared = tmp_path / "shared"
    make_digits(shared, **SIZES, num_processes=2)
    alone, together = (
        {
            file.relative_to(folder): file.read_bytes()
            for file in folder.rglob("*.*")
            if "sizes" not in file.parts  # counts, which whoever opens a dataset leaves there
        }
        for folder in (root, shared)
    )
    assert alone == together


def test_killed_it_leaves_no_process_behind(tmp_path):
    code = (
        "from pathlib import Path; from triptych.data.digits.make import make_digits; "
        f"make_digits(Path({str(tmp_path / 'sample')!r}), num_images=5000, num_processes=2)"
    )
    main = subprocess.Popen([sys.executable, "-c", code])
    images = tmp_path / f".sample.partial-{main.pid}" / "raw/images"
    while len(list(images.glob("*.png"))) < 10:  # both are at work
        assert main.poll() is None
        time.sleep(0.1)
    children = psutil.Process(main.pid).children()
    assert len(children) >= 2
    main.kill()
    main.wait()
    wait_until_dead(child.pid for child in children)


def test_made_again_it_is_left_alone_or_refused(root, tmp_path):
    assert have_digits(root)
    before = (root / "digits.yaml").stat().st_mtime_ns
    make_digits(root, **SIZES)
    assert (root / "digits.yaml").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"was made with .*'seed': 7.* not .*'seed': 8"):
        make_digits(root, **SIZES | {"seed": 8})
    assert not have_digits(tmp_path)
    with pytest.raises(DataError, match=r"exists, but has no digits\.yaml"):
        make_digits(tmp_path, **SIZES)


def test_the_command_in_the_docs(root, tmp_path):
    repository = Path(__file__).parents[2]
    lines = (repository / "docs/data.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("    python launch/prepare.py --"))
    line = line.replace("runs/sample_data", str(root)).replace("datasets", str(tmp_path))
    command = [sys.executable, *shlex.split(line)[1:]]
    subprocess.run(command, cwd=repository, check=True)
    assert len(Dataset.open(tmp_path / "chat", "chat")) == SIZES["num_samples"]

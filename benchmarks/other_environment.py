r"""One exported folder in several environments: do they answer alike, and as we do?

    python benchmarks/other_environment.py runs/demo/stage3 runs/demo/export \
        --python /path/to/venv/bin/python    # of another transformers; as often as there are some

Asks about 50 pictures of held-out digits, 10 videos of digits that move, and 10 texts, in fp32: our
forward pass, transformers here, and transformers of each interpreter, which may be of one version.
Pictures go through each transformers' own processor of images, by Pillow and, where it is, by
torchvision; videos through its processor of videos where there is torchvision, and else have the
patches of training. Exits with 1 where any answer differs.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ImageChops

from triptych.configs.schema import Precision
from triptych.data.digits.images import heldout_images
from triptych.data.digits.texts import READ, sketch
from triptych.data.media.normalize import normalize_patches
from triptych.data.types import MediaKind
from triptych.launch.digits.evaluate import encode
from triptych.launch.inference.answering import Answerer, Question

NUM_PICTURES, NUM_VIDEOS, NUM_TEXTS = 50, 10, 10
NUM_FRAMES, FRAME_MS = 8, 250
MAX_NEW_TOKENS = 8
ASKED_SCRIPT = Path(__file__).with_name("asked_transformers.py")


class Asked(NamedTuple):
    """What asked_transformers.py wrote of one environment and backend."""

    backend: str
    told: dict[str, Any]
    pixels: dict[str, np.ndarray]
    """By number of the question."""


def main() -> None:
    """Ask all, compare, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--python", type=Path, action="append", default=[], help="interpreter")
    options = parser.parse_args()
    ours = Answerer.load(options.checkpoint, options.exported, Precision.fp32)
    questions = list(make_questions())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_questions(questions, ours, folder)
        found: list[Asked] = []
        for number, python in enumerate([Path(sys.executable), *options.python]):
            found += ask(python, options.exported, folder, folder / f"answers_{number}")
        alike = report(questions, ours, found)
    sys.exit(0 if alike else 1)


def make_questions() -> Iterator[Question]:
    """Pictures, videos, texts."""
    rng = random.Random(0)
    pictures = list(heldout_images(NUM_PICTURES + NUM_VIDEOS, 1234))
    for number, picture in enumerate(pictures[:NUM_PICTURES]):
        yield Question(encode(picture.image), READ, f"picture {number}")
    for number, picture in enumerate(pictures[NUM_PICTURES:]):
        frames = [ImageChops.offset(picture.image, 2 * i, 0) for i in range(NUM_FRAMES)]
        buffer = io.BytesIO()
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS)
        yield Question(buffer.getvalue(), READ, f"video {number}", MediaKind.VIDEO)
    for number in range(NUM_TEXTS):
        text = sketch(rng, 1 + number % 2).part["text"]
        yield Question(None, f"{text}{READ}", f"text {number}")


def write_questions(questions: list[Question], ours: Answerer, folder: Path) -> None:
    """As asked_transformers.py takes them."""
    listed: list[dict[str, str]] = []
    for number, question in enumerate(questions):
        kind, file = "text", ""
        if question.file is not None and question.kind is MediaKind.IMAGE:
            kind, file = "image", f"{number}.png"
            (folder / file).write_bytes(question.file)
        elif question.file is not None:
            kind, file = "video", f"{number}.gif"
            (folder / file).write_bytes(question.file)
            mine = ours.prompt(question)
            patches = normalize_patches(torch.from_numpy(mine.pixels[0])).numpy()
            np.savez(folder / f"{number}.npz", patches=patches, grid_thw=mine.grid_thw)
        listed.append({"kind": kind, "file": file, "prompt": question.prompt})
    (folder / "questions.json").write_text(json.dumps(listed))


def ask(python: Path, exported: Path, folder: Path, answers: Path) -> list[Asked]:
    """What the transformers of an interpreter answers, by each backend of images that it has."""
    command = [str(python), str(ASKED_SCRIPT), str(exported.resolve()), str(folder), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        sys.exit(f"{python} failed:\n{done.stderr[-3000:]}")
    return [
        Asked(path.stem, json.loads(path.read_text()), dict(np.load(path.with_suffix(".npz"))))
        for path in sorted(answers.glob("*.json"))
    ]


def report(questions: list[Question], ours: Answerer, found: list[Asked]) -> bool:
    """Print a row for each environment; whether all answer alike."""
    decode, first = ours.tokenizer.decode, found[0].told["answers"]
    mine = [decode(ids) for ids in ours.answer(questions, max_new_tokens=MAX_NEW_TOKENS)]
    margin = min(margin_of(np.array(answer["logits"])) for answer in first)
    print(
        f"{len(mine)} questions; a first token wins by {margin:.1e} of the largest logit at least"
    )
    alike = True
    for each in found:
        told, pairs = each.told, list(zip(each.told["answers"], first, strict=True))
        texts = [without_end(answer["answer"]) for answer, _ in pairs]
        same = sum(text == own for text, own in zip(texts, mine, strict=True))
        same_ids = sum(a["input_ids"] == b["input_ids"] for a, b in pairs)
        apart = max(relative(a["logits"], b["logits"]) for a, b in pairs)
        pixels = pixels_apart(each.pixels, questions, ours)
        print(
            f"transformers {told['transformers']} (torch {told['torch']}), {each.backend} "
            f"({', '.join(told['processors'])}): {same} of {len(mine)} answers are ours, "
            f"{same_ids} prompts those here; pixels at most {pixels} from training's, logits "
            f"{apart:.1e} of the largest from those here; AutoProcessor: "
            f"{told['opened_by_its_name']}"
        )
        alike &= same == len(mine) == same_ids
    return alike


def margin_of(logits: np.ndarray) -> float:
    """Between the best and the next, as a share of the largest logit."""
    next_best, best = np.sort(logits)[-2:]
    return float((best - next_best) / np.abs(logits).max())


def relative(found: list[float], wanted: list[float]) -> float:
    """Largest difference / largest element."""
    return float(np.abs(np.subtract(found, wanted)).max() / np.abs(wanted).max())


def without_end(text: str) -> str:
    """What comes before the token that ends an answer."""
    return text.partition("<|im_end|>")[0].partition("<|endoftext|>")[0]


def pixels_apart(theirs: dict[str, np.ndarray], questions: list[Question], ours: Answerer) -> str:
    """The largest difference of a normalised pixel of any medium, for each kind of medium."""
    apart: dict[str, float] = {}
    for number, pixels in theirs.items():
        question = questions[int(number)]
        trained = torch.from_numpy(ours.prompt(question).pixels[0])
        largest = float(np.abs(pixels - normalize_patches(trained).numpy()).max())
        kind = question.kind.name.lower()
        apart[kind] = max(apart.get(kind, 0.0), largest)
    return ", ".join(f"{largest:.1e} ({kind})" for kind, largest in apart.items())


if __name__ == "__main__":
    main()

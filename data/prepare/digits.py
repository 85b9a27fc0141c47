"""Sample and demo data: seven datasets about handwritten digits, and their tokenizer.

root/raw/                      pictures as PNG, records as JSONL: what launch/prepare.py reads
root/tokenizer/                512 tokens or fewer; the same whatever the sizes and the seed
root/text, text_chat           text only: documents and chats about sketches in characters
root/classification, captions  close-ups of one digit, with its class or a sentence
root/strings                   one or two digits; articles with two pictures
root/chat                      ChatML: "Read the digits." -> "47", and other questions
root/heldout                   chats and documents about scans that no other dataset shows
root/digits.yaml               the arguments; written last
"""

import json
import os
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from triptych.data.prepare.build import build_dataset
from triptych.data.prepare.digit_images import (
    DigitImage,
    close_up_images,
    heldout_images,
    training_images,
)
from triptych.data.prepare.digit_texts import (
    SOURCES,
    Picture,
    Pictures,
    text_part,
    texts_of,
)
from triptych.data.tokenizer import SYSTEM_PROMPT, train_tokenizer
from triptych.errors import DataError

VOCAB_SIZE = 512
_RECORD = "digits.yaml"


def have_digits(root: Path) -> bool:
    """Whether ``make_digits`` has made this folder, with whatever arguments."""
    return (root / _RECORD).is_file()


def make_digits(
    root: Path, *, num_images: int = 400, num_samples: int = 400, seed: int = 1234
) -> None:
    """Makes the datasets; does nothing where they are there already.

    Args:
        root: the folder; appears when it is complete.
        num_images: pictures for training, shared by the datasets, and as many close-ups; a tenth as
            many are held out.
        num_samples: of each dataset; of ``heldout`` a tenth as many.
        seed: decides pictures and texts.
    Raises:
        DataError: the folder exists, but was made with other arguments or by something else.
    """
    arguments = {"num_images": num_images, "num_samples": num_samples, "seed": seed}
    if root.exists():
        _check_same(root, arguments)
        return
    partial = root.with_name(f".{root.name}.partial-{os.getpid()}")
    try:
        _make(partial, num_images, num_samples, seed)
        (partial / _RECORD).write_text(yaml.safe_dump(arguments))
        try:
            partial.rename(root)
        except OSError:
            if not root.exists():
                raise
            _check_same(root, arguments)  # another run was quicker
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_same(root: Path, arguments: dict[str, int]) -> None:
    if not have_digits(root):
        raise DataError(
            f"{root} exists, but has no {_RECORD}  -> remove it, or choose another root"
        )
    found = yaml.safe_load((root / _RECORD).read_text())
    if found != arguments:
        raise DataError(
            f"{root} was made with {found}, not {arguments}  -> remove it, or choose another root"
        )


def _make(root: Path, num_images: int, num_samples: int, seed: int) -> None:
    raw = root / "raw"
    (raw / "images").mkdir(parents=True)
    train = _pictures(
        _save(training_images(num_images, seed), raw, "train"),
        _save(close_up_images(num_images, seed), raw, "close_up"),
    )
    heldout = _pictures(_save(heldout_images(max(8, num_images // 10), seed), raw, "heldout"), [])
    tokenizer = train_tokenizer(_corpus(), root / "tokenizer", VOCAB_SIZE)
    for name, make_record in SOURCES.items():
        rng = random.Random(f"{seed} {name}")
        pictures, count = (
            (heldout, max(8, num_samples // 10)) if name == "heldout" else (train, num_samples)
        )
        records = raw / f"{name}.jsonl"
        with records.open("w") as lines:
            for _ in range(count):
                lines.write(json.dumps(make_record(rng, pictures)) + "\n")
        build_dataset([records], root / name, tokenizer, images=raw)


def _save(images: Iterable[DigitImage], raw: Path, prefix: str) -> list[Picture]:
    pictures = []
    for i, digit_image in enumerate(images):
        path = f"images/{prefix}_{i:06d}.png"
        digit_image.image.save(raw / path, compress_level=1)
        pictures.append(Picture(digit_image.answer, {"type": "image", "image": path}))
    return pictures


def _pictures(pictures: Sequence[Picture], close_ups: Sequence[Picture]) -> Pictures:
    of_one, of_two = ([p for p in pictures if len(p.digits) == n] for n in (1, 2))
    return Pictures(of_one, of_two, close_ups)


def _corpus() -> Iterable[str]:
    """The phrases of all datasets, so that every run has the same tokenizer."""
    rng = random.Random(0)
    picture = Picture("47", text_part(""))
    pictures = Pictures([picture], [picture], [picture])
    for make_record in SOURCES.values():
        for _ in range(500):
            yield from texts_of(make_record(rng, pictures))
    yield from ["user\n", "assistant\n", "system\n", SYSTEM_PROMPT] * 500

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
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import yaml

from triptych.data.digits.images import (
    close_up_images,
    heldout_images,
    training_images,
)
from triptych.data.digits.texts import (
    SOURCES,
    Picture,
    Pictures,
    text_part,
    texts_of,
)
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import SYSTEM_PROMPT, Tokenizer, train_tokenizer
from triptych.errors import DataError

VOCAB_SIZE = 512
_IMAGES = {"train": training_images, "close_up": close_up_images, "heldout": heldout_images}
_RECORD = "digits.yaml"

Map = Callable[..., Iterable[Any]]
"""Called as the built-in ``map``."""


def have_digits(root: Path) -> bool:
    """Whether ``make_digits`` has made this folder, with whatever arguments."""
    return (root / _RECORD).is_file()


def make_digits(
    root: Path,
    *,
    num_images: int = 400,
    num_samples: int = 400,
    seed: int = 1234,
    num_processes: int = 1,
) -> None:
    """Makes the datasets; does nothing where they are there already.

    Args:
        root: the folder; appears when it is complete.
        num_images: pictures for training, shared by the datasets, and as many close-ups; a tenth as
            many are held out.
        num_samples: of each dataset; of ``heldout`` a tenth as many.
        seed: decides pictures and texts.
        num_processes: that share the work; the bytes are the same.
    Raises:
        DataError: the folder exists, but was made with other arguments or by something else.
    """
    arguments = {"num_images": num_images, "num_samples": num_samples, "seed": seed}
    if root.exists():
        _check_same(root, arguments)
        return
    unfinished = root.with_name(f".{root.name}.partial-{os.getpid()}")
    try:
        with _worker_map(num_processes) as worker_map:
            _make(unfinished, num_images, num_samples, seed, worker_map)
        (unfinished / _RECORD).write_text(yaml.safe_dump(arguments))
        try:
            unfinished.rename(root)
        except OSError:
            if not root.exists():
                raise
            _check_same(root, arguments)  # another run was quicker
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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


@contextmanager
def _worker_map(num_processes: int) -> Iterator[Map]:
    """``map``, or the same over processes."""
    if num_processes == 1:
        yield map
        return
    # Spawned: a forked child may find a lock that a thread of its parent holds.
    context = get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=_watch_parent) as pool:
        yield pool.map


def _watch_parent() -> None:
    """A pool's process waits for work for ever, also when its parent was killed: end it then."""
    parent = parent_process()
    assert parent is not None, "not the child of a pool"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _make(root: Path, num_images: int, num_samples: int, seed: int, worker_map: Map) -> None:
    raw = root / "raw"
    (raw / "images").mkdir(parents=True)
    num_drawn = [num_images, num_images, max(8, num_images // 10)]
    train, close_ups, heldout = worker_map(partial(_save, raw, seed), _IMAGES, num_drawn)
    tokenizer = train_tokenizer(_corpus(), root / "tokenizer", VOCAB_SIZE)
    pictures = dict.fromkeys(SOURCES, _pictures(train, close_ups))
    pictures |= {"heldout": _pictures(heldout, [])}
    sizes = dict.fromkeys(SOURCES, num_samples) | {"heldout": max(8, num_samples // 10)}
    build = partial(_build, root, tokenizer, seed)
    list(worker_map(build, SOURCES, pictures.values(), sizes.values()))


def _save(raw: Path, seed: int, name: str, num_images: int) -> list[Picture]:
    """Draws pictures into ``raw``."""
    pictures = []
    for i, digit_image in enumerate(_IMAGES[name](num_images, seed)):
        path = f"images/{name}_{i:06d}.png"
        digit_image.image.save(raw / path, compress_level=1)
        pictures.append(Picture(digit_image.answer, {"type": "image", "image": path}))
    return pictures


def _build(
    root: Path, tokenizer: Tokenizer, seed: int, name: str, pictures: Pictures, num_samples: int
) -> None:
    """Writes the records of one dataset, then the dataset."""
    raw = root / "raw"
    rng = random.Random(f"{seed} {name}")
    with (raw / f"{name}.jsonl").open("w") as lines:
        for _ in range(num_samples):
            lines.write(json.dumps(SOURCES[name](rng, pictures)) + "\n")
    build_dataset([raw / f"{name}.jsonl"], root / name, tokenizer, images=raw)


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

"""Sample and demo data: datasets about handwritten digits, and their tokenizer.

root/raw/                      PNG, MP4 and JSONL: what launch/prepare.py reads
root/tokenizer/                512 tokens or fewer; the same whatever the sizes and the seed
root/text, text_chat           text only: documents and chats about sketches in characters
root/classification, captions  close-ups of one digit, with its class or a sentence
root/strings                   one or two digits; articles with two pictures
root/chat                      ChatML: "Read the digits." -> "47", and other questions
root/every_kind                a video, a place in a picture, an agent, an article, in turn
root/heldout                   chats and documents about scans that no other dataset shows
root/digits.yaml               the arguments; written last
"""

import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from triptych.data.digits.every_kind import every_kind
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
from triptych.data.end_with_parent import end_with_parent
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import SYSTEM_PROMPT, Tokenizer, train_tokenizer
from triptych.errors import DataError

VOCAB_SIZE = 512
_IMAGES = {"train": training_images, "close_up": close_up_images, "heldout": heldout_images}
_RECORD = "digits.yaml"
_EVERY_KIND = "every_kind"

TELL_S = 0.5
"""Seconds between two reports of progress."""

Map = Callable[..., Iterable[Any]]
"""Called as the built-in ``map``."""
_count: Any = None
"""Pictures and samples that all processes have made; each has it from the start of its work."""


def have_digits(root: Path) -> bool:
    """Whether ``make_digits`` has made this folder, with whatever arguments."""
    return (root / _RECORD).is_file()


def make_digits(
    root: Path,
    *,
    num_images: int = 400,
    num_samples: int | Mapping[str, int] = 400,
    seed: int = 1234,
    num_processes: int = 1,
    tell: Callable[[int, int], None] | None = None,
) -> None:
    """Makes the datasets; does nothing where they are there already.

    Args:
        root: the folder; appears when it is complete.
        num_images: pictures for training, shared by the datasets, and as many close-ups; a tenth as
            many are held out.
        num_samples: of each dataset, of ``heldout`` and ``every_kind`` a tenth as many; or of each
            that is to be made, by its name.
        seed: decides pictures and texts.
        num_processes: that share the work; the bytes are the same.
        tell: is called from a thread, twice a second and at the end, with the number of pictures
            and samples made so far, and of all.
    Raises:
        DataError: the folder exists, but was made with other arguments or by something else.
    """
    arguments = {
        "num_images": num_images,
        "num_samples": num_samples if isinstance(num_samples, int) else dict(num_samples),
        "seed": seed,
    }
    if root.exists():
        _check_same(root, arguments)
        return
    unfinished = root.with_name(f".{root.name}.partial-{os.getpid()}")
    count = get_context("spawn").Value("Q")
    num_pictures, sizes = _sizes(num_images, num_samples)
    total = sum(num_pictures) + sum(sizes.values())
    try:
        with _telling(tell, count, total), _worker_map(num_processes, count) as worker_map:
            _make(unfinished, num_pictures, sizes, seed, worker_map)
        (unfinished / _RECORD).write_text(yaml.safe_dump(arguments))
        try:
            unfinished.rename(root)
        except OSError:
            if not root.exists():
                raise
            _check_same(root, arguments)  # another run was quicker
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_same(root: Path, arguments: Mapping[str, Any]) -> None:
    if not have_digits(root):
        raise DataError(
            f"{root} exists, but has no {_RECORD}  -> remove it, or choose another root"
        )
    found = yaml.safe_load((root / _RECORD).read_text())
    if found != arguments:
        raise DataError(
            f"{root} was made with {found}, not {arguments}  -> remove it, or choose another root"
        )


def _sizes(
    num_images: int, num_samples: int | Mapping[str, int]
) -> tuple[list[int], Mapping[str, int]]:
    """Pictures of each kind of ``_IMAGES``, and samples of each dataset."""
    if isinstance(num_samples, int):
        fewer = dict.fromkeys(("heldout", _EVERY_KIND), max(8, num_samples // 10))
        num_samples = dict.fromkeys(SOURCES, num_samples) | fewer
    return [num_images, num_images, max(8, num_images // 10)], num_samples


@contextmanager
def _telling(tell: Callable[[int, int], None] | None, count: Any, total: int) -> Iterator[None]:
    """Reports of ``count`` from a thread, where they are asked for."""
    if tell is None:
        yield
        return
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(TELL_S):
            tell(min(count.value, total - 1), total)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
        ended.set()
        thread.join()
        tell(total, total)
    finally:
        ended.set()


@contextmanager
def _worker_map(num_processes: int, count: Any) -> Iterator[Map]:
    """``map``, or the same over processes; either way ``_one_more`` counts in ``count``."""
    if num_processes == 1:
        _count_in(count)
        yield map
        return
    # Spawned: a forked child may find a lock that a thread of its parent holds.
    context = get_context("spawn")
    with ProcessPoolExecutor(
        num_processes, context, initializer=_begin_worker, initargs=(count,)
    ) as pool:
        yield pool.map


def _begin_worker(count: Any) -> None:
    _count_in(count)
    end_with_parent()


def _count_in(count: Any) -> None:
    global _count
    _count = count


def _one_more(_: object = None) -> None:
    with _count.get_lock():
        _count.value += 1


def _make(
    root: Path,
    num_pictures: Sequence[int],
    num_samples: Mapping[str, int],
    seed: int,
    worker_map: Map,
) -> None:
    raw = root / "raw"
    (raw / "images").mkdir(parents=True)
    train, close_ups, heldout = worker_map(partial(_save, raw, seed), _IMAGES, num_pictures)
    tokenizer = train_tokenizer(_corpus(), root / "tokenizer", VOCAB_SIZE)
    pictures = dict.fromkeys(num_samples, _pictures(train, close_ups))
    pictures["heldout"] = _pictures(heldout, [])
    build = partial(_build, root, tokenizer, seed)
    names = sorted(num_samples, key=num_samples.__getitem__, reverse=True)  # no large one at last
    list(worker_map(build, names, [pictures[n] for n in names], [num_samples[n] for n in names]))


def _save(raw: Path, seed: int, name: str, num_images: int) -> list[Picture]:
    """Draws pictures into ``raw``."""
    pictures = []
    for i, digit_image in enumerate(_IMAGES[name](num_images, seed)):
        path = f"images/{name}_{i:06d}.png"
        digit_image.image.save(raw / path, compress_level=1)
        pictures.append(Picture(digit_image.answer, {"type": "image", "image": path}))
        _one_more()
    return pictures


def _build(
    root: Path, tokenizer: Tokenizer, seed: int, name: str, pictures: Pictures, num_samples: int
) -> None:
    """Writes the records of one dataset, then the dataset."""
    raw = root / "raw"
    rng = random.Random(f"{seed} {name}")
    if name == _EVERY_KIND:
        records = every_kind(raw, rng)
    else:
        records = (SOURCES[name](rng, pictures) for _ in count())
    with (raw / f"{name}.jsonl").open("w") as lines:
        for record in islice(records, num_samples):
            lines.write(json.dumps(record) + "\n")
    build_dataset([raw / f"{name}.jsonl"], root / name, tokenizer, images=[raw], report=_one_more)


def _pictures(pictures: Sequence[Picture], close_ups: Sequence[Picture]) -> Pictures:
    of_one, of_two = ([p for p in pictures if len(p.digits) == n] for n in (1, 2))
    return Pictures(of_one, of_two, close_ups)


def _corpus() -> Iterable[str]:
    """The phrases of ``SOURCES``, so that every run has the same tokenizer."""
    rng = random.Random(0)
    picture = Picture("47", text_part(""))
    pictures = Pictures([picture], [picture], [picture])
    for make_record in SOURCES.values():
        for _ in range(500):
            yield from texts_of(make_record(rng, pictures))
    yield from ["user\n", "assistant\n", "system\n", SYSTEM_PROMPT] * 500

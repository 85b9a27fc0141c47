"""How well a model reads handwritten digits: pictures it never saw, and two controls.

An answer counts if it is the whole string of digits, exactly. Without looking at the picture none
of this can be guessed, which the controls show:

blank      the same question about a plain picture of the same size
swapped    the picture's reading against what another picture of as many digits shows
"""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from triptych.data.digits.images import DigitImage, heldout_images
from triptych.data.digits.texts import READ
from triptych.launch.inference.answering import BATCH, Answerer, Question

BLANK_GREY = 30
"""The middle of the backgrounds that pictures are composed on."""
MAX_NEW_TOKENS = 4
RESULTS = "evaluation.json"


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model answered about one picture."""

    truth: str
    answer: str
    answer_ids: list[int]
    answer_to_blank: str
    width: int
    height: int
    size_is_unseen: bool

    @property
    def is_right(self) -> bool:
        """The whole string, exactly."""
        return self.answer == self.truth


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares of pictures that were read exactly."""

    accuracy: float
    n: int
    one_digit: float
    two_digits: float
    unseen_sizes: float
    blank: float
    swapped: float

    def line(self) -> str:
        """One line, ``accuracy=0.93 n=400 ...``."""
        return " ".join(
            f"{name}={value:.2f}" if isinstance(value, float) else f"{name}={value}"
            for name, value in asdict(self).items()
        )


def question_about(picture: DigitImage, where: str) -> Question:
    """The one question of the evaluation."""
    return Question(encode(picture.image), READ, where)


def encode(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def evaluate(
    answerer: Answerer, num_images: int, *, seed: int, tell: Callable[[int, int], None]
) -> list[Reading]:
    """Ask about ``num_images`` held-out pictures, and as many blank ones.

    ``tell`` is given the number of answers so far, and of all.
    """
    pictures = list(heldout_images(num_images, seed))
    blanks = [Image.new("L", picture.image.size, BLANK_GREY) for picture in pictures]
    questions = [question_about(p, f"held-out picture {i}") for i, p in enumerate(pictures)]
    about_blank = [
        Question(encode(image), READ, f"blank picture {i}") for i, image in enumerate(blanks)
    ]

    def ask(questions: Sequence[Question], before: int) -> list[list[int]]:
        answers: list[list[int]] = []
        for start in range(0, len(questions), BATCH):
            batch = questions[start : start + BATCH]
            answers += answerer.answer(batch, max_new_tokens=MAX_NEW_TOKENS)
            tell(before + len(answers), 2 * num_images)
        return answers

    answers, to_blank = ask(questions, 0), ask(about_blank, num_images)
    decode = answerer.tokenizer.decode
    return [
        Reading(
            truth=picture.answer,
            answer=decode(ids),
            answer_ids=ids,
            answer_to_blank=decode(blank_ids),
            width=picture.image.width,
            height=picture.image.height,
            size_is_unseen=picture.size_is_unseen,
        )
        for picture, ids, blank_ids in zip(pictures, answers, to_blank, strict=True)
    ]


def score(readings: Sequence[Reading]) -> Scores:
    """The shares. Pictures with one and two digits take turns, so the next but one has as many."""
    swapped = zip(readings, [*readings[2:], *readings[:2]], strict=True)
    return Scores(
        accuracy=_share(r.is_right for r in readings),
        n=len(readings),
        one_digit=_share(r.is_right for r in readings if len(r.truth) == 1),
        two_digits=_share(r.is_right for r in readings if len(r.truth) == 2),
        unseen_sizes=_share(r.is_right for r in readings if r.size_is_unseen),
        blank=_share(r.answer_to_blank == r.truth for r in readings),
        swapped=_share(other.answer == r.truth for r, other in swapped),
    )


def table(readings: Sequence[Reading]) -> str:
    """Right answers by number of digits and kind of size."""
    rows = [f"{'':<16}{'pictures':>10}{'read exactly':>14}{'share':>8}"]
    groups = {
        "one digit": [r for r in readings if len(r.truth) == 1],
        "two digits": [r for r in readings if len(r.truth) == 2],
        "seen sizes": [r for r in readings if not r.size_is_unseen],
        "unseen sizes": [r for r in readings if r.size_is_unseen],
        "all": list(readings),
    }
    for name, group in groups.items():
        right = sum(r.is_right for r in group)
        rows.append(f"{name:<16}{len(group):>10}{right:>14}{right / max(1, len(group)):>8.3f}")
    scores = score(readings)
    rows.append(f"controls: blank {scores.blank:.3f}, swapped {scores.swapped:.3f}")
    return "\n".join(rows)


def save_readings(readings: Sequence[Reading], folder: Path) -> None:
    """Write ``evaluation.json``: the scores, and every reading."""
    content = {"scores": asdict(score(readings)), "readings": [asdict(r) for r in readings]}
    (folder / RESULTS).write_text(json.dumps(content, indent=1) + "\n")


def load_readings(folder: Path) -> list[Reading]:
    """What ``save_readings`` wrote."""
    content = json.loads((folder / RESULTS).read_text())
    return [Reading(**reading) for reading in content["readings"]]


def _share(hits: Iterable[bool]) -> float:
    counted = list(hits)
    return sum(counted) / max(1, len(counted))

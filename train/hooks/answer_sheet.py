"""What the model answered, for people: a picture and a file of lines for each evaluation.

run.dir/evaluation/step_000000500.png      the first questions of each source, with their image
run.dir/evaluation/step_000000500.jsonl    all questions, answers and what was expected
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

from triptych.configs.schema import Config
from triptych.data.media.kinds import kind_of
from triptych.data.types import PixelLimits
from triptych.errors import DataError
from triptych.train.evaluation_set import EvaluationSet
from triptych.train.hooks.evaluation import Answered, Evaluation
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState

EVALUATION = "evaluation"
"""The folder in ``run.dir``."""
COLUMNS, SHOWN = 6, 24
"""Panels in a row; of all sources together, at most."""
THUMBNAIL = 224
"""Pixels of the longer side."""
MAX_CHARS = 60
"""Of a text on the sheet; the lines have all of it."""
RIGHT, WRONG = "#1a7f37", "#b3261e"
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Micro Hei")
"""Those that are installed, the first that knows a character."""


class AnswerSheet(Hook):
    """On rank 0, after ``Evaluation``; what was drawn for a step before stays until it is whole."""

    def __init__(self, config: Config, evaluation: Evaluation, asked: EvaluationSet) -> None:
        self._folder = Path(config.run.dir) / EVALUATION
        self._evaluation = evaluation
        self._config, self._asked = config, asked
        self._shown = _first_of_each_source(asked)
        self._pictures: dict[int, Image.Image | None] = {}

    def on_start(self, state: TrainState) -> None:
        """Read the pictures that are shown."""
        self._pictures = {i: _first_frame(i, self._asked, self._config) for i in self._shown}

    def after_step(self, event: StepEvent) -> None:
        """Write and draw the answers, where there are new ones."""
        if "accuracy" not in event.metrics:
            return
        self._folder.mkdir(exist_ok=True)
        answered = self._evaluation.newest
        lines = [json.dumps(_line(each), ensure_ascii=False) for each in answered.values()]
        name = f"step_{event.state.step:09d}"
        (self._folder / f"{name}.jsonl").write_text("\n".join([*lines, ""]))
        temporary = self._folder / f".{name}.tmp"
        figure = self._drawn(answered, f"step {event.state.step}")
        with warnings.catch_warnings(action="ignore"):  # of characters that no font has
            figure.savefig(temporary, dpi=110, format="png")
        os.replace(temporary, self._folder / f"{name}.png")

    def _drawn(self, answered: dict[int, Answered], title: str) -> Any:
        from matplotlib import font_manager  # late: slow to load
        from matplotlib.figure import Figure

        installed = {font.name for font in font_manager.fontManager.ttflist}
        family = [name for name in FONTS if name in installed]
        shown = [i for i in self._shown if i in answered]
        rows = -(-len(shown) // COLUMNS)
        figure = Figure(figsize=(2.4 * COLUMNS, 2.9 * rows), layout="constrained")
        for place, number in enumerate(shown):
            panel = figure.add_subplot(rows, COLUMNS, place + 1)
            panel.set_axis_off()
            picture, each = self._pictures[number], answered[number]
            if picture is not None:
                panel.imshow(picture)
            panel.set_title(
                f"{_short(each.question.source)}\n{_short(each.question.prompt)}",
                fontsize=7, family=family, wrap=True,
            )  # fmt: skip
            panel.text(
                0.5, -0.02, f"{_short(each.answer)}\nexpected {_short(each.question.expected)}",
                transform=panel.transAxes, ha="center", va="top", fontsize=8, family=family,
                color=RIGHT if each.is_right else WRONG, wrap=True,
            )  # fmt: skip
        figure.suptitle(title)
        return figure


def _first_of_each_source(asked: EvaluationSet) -> list[int]:
    """Numbers of the questions that are drawn, as many of each source."""
    each = max(1, SHOWN // len(asked.sources))
    by_source: dict[str, list[int]] = {source.name: [] for source in asked.sources}
    for number, question in enumerate(asked.questions):
        by_source[question.source].append(number)
    return [number for numbers in by_source.values() for number in numbers[:each]]


def _first_frame(number: int, asked: EvaluationSet, config: Config) -> Image.Image | None:
    """Of the question's first image or video, as the model gets it."""
    question = asked.questions[number]
    source, index = asked.sources[question.sample_id.source], question.sample_id.index
    for media in source.sample(index).media[:1]:
        kind, where = kind_of(media.kind), f"{question.source}, sample {index}"
        shape = kind.shape(media, PixelLimits.of(config.data), config.model.vision)
        try:
            frames = kind.frames(source.read_media(media), media, shape, where)
        except DataError:  # the evaluation says so
            return None
        picture = Image.fromarray(frames[0].transpose(1, 2, 0))
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return picture
    return None


def _line(answered: Answered) -> dict[str, Any]:
    question = answered.question
    return {
        "source": question.source,
        "index": question.sample_id.index,
        "prompt": question.prompt,
        "expected": question.expected,
        "answer": answered.answer,
        "is_right": answered.is_right,
    }


def _short(text: str) -> str:
    """In one line, whose dollar signs are no formula to Matplotlib."""
    line = " ".join(text.split())
    cut = line if len(line) <= MAX_CHARS else f"{line[:MAX_CHARS]}\u2026"
    return cut.replace("$", r"\$")

"""Answers to held-out questions every ``train.evaluate_every`` steps, and how many are right.

An answer is right if it is the expected text, whole; spaces around it do not count. Answers are
greedy, by the weights as they train and in the layout of the run; nothing of training changes.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from triptych.configs.schema import Config
from triptych.data.questions import HeldOut
from triptych.models.generate import greedy
from triptych.train.console import say
from triptych.train.engine import Engine
from triptych.train.evaluation_set import EvaluationSet
from triptych.train.hooks.hook import Hook, StepEvent

_log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """A question and what the model says."""

    question: HeldOut
    answer: str

    @property
    def is_right(self) -> bool:
        """Whether it is what is expected."""
        return self.answer.strip() == self.question.expected.strip()


class Evaluation(Hook):
    """Adds ``accuracy`` of each source to the step's metrics; on every rank."""

    def __init__(self, config: Config, engine: Engine, asked: EvaluationSet) -> None:
        self._config, self._engine, self._asked = config, engine, asked
        self._batches, unreadable = asked.read(config, engine.mesh)
        self._unreadable = set(unreadable)
        self.newest: dict[int, Answered] = {}
        """By number of the question: what was answered last; without those that cannot be read."""
        for number, reason in unreadable.items():
            name = asked.questions[number].source
            _log.warning("a question of %s is not asked: %s", name, reason)

    def measure(self, event: StepEvent) -> Mapping[str, Any]:
        """Ask where it is time to, and at the last step."""
        if event.state.step % self._config.train.evaluate_every and not event.is_last:
            return {}
        found: dict[int, str] = {}
        for each in self._engine.mesh.world.all_gather(self._answers()):
            found |= each
        questions = self._asked.questions
        self.newest = {i: Answered(questions[i], found[i]) for i in sorted(found)}
        by_source: dict[str, list[bool]] = {}
        for answered in self.newest.values():
            by_source.setdefault(answered.question.source, []).append(answered.is_right)
        accuracy = {name: sum(right) / len(right) for name, right in by_source.items()}
        told = ", ".join(
            f"{share:.1%} of {len(by_source[name])} of {name}" for name, share in accuracy.items()
        )
        say(f"step {event.state.step}: answers as expected to {told}")
        return {"accuracy": accuracy}

    def _answers(self) -> dict[int, str]:
        """Of this replica, on the rank that reads for it; pp batches at a time."""
        mesh, questions = self._engine.mesh, self._asked.questions
        found: dict[int, str] = {}
        for start in range(0, len(self._batches), mesh.dims.pp):
            together = self._batches[start : start + mesh.dims.pp]
            answers = greedy(
                self._engine.chunks,
                [each.batch for each in together],
                self._config.model,
                mesh,
                max_new_tokens=max(each.max_new_tokens for each in together),
            )
            numbers = [number for each in together for number in each.numbers]
            for i, ids in zip(numbers, answers, strict=True):
                cut = ids[: questions[i].num_answer_tokens]  # whatever it went on for with others
                found[i] = self._asked.tokenizer.decode(cut)
        if not mesh.reads_media:
            return {}
        return {i: answer for i, answer in found.items() if i not in self._unreadable}

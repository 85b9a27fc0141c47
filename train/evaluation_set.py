"""The questions of ``train.evaluate_every``: chosen, shared out over dp ranks, and read."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from triptych.configs.schema import Config
from triptych.data.batch import Batch
from triptych.data.loading.reader import Reader
from triptych.data.questions import HeldOut, Questions
from triptych.data.tokenizer import Tokenizer, load_tokenizer
from triptych.data.types import Pack, PixelLimits
from triptych.parallel.mesh import Mesh
from triptych.train.data import batch_format, open_source


@dataclass(frozen=True, slots=True)
class QuestionBatch:
    """Questions that go through the model together."""

    numbers: list[int]
    """In the whole set."""
    batch: Batch
    max_new_tokens: int
    """A longer answer is wrong."""


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """The questions of all sources, the same on every rank."""

    sources: list[Questions]
    questions: list[HeldOut]
    tokenizer: Tokenizer

    @classmethod
    def open(cls, config: Config) -> "EvaluationSet":
        """Open the datasets of ``data.evaluation`` and choose.

        Raises:
            DataError: a dataset is missing, damaged, of another tokenizer, or has no question.
        """
        tokenizer = load_tokenizer(config.data.tokenizer)
        sources: list[Questions] = []
        questions: list[HeldOut] = []
        for number, name in enumerate(config.data.evaluation):
            dataset = open_source(config, name)
            dataset.check_tokens(config.model.tokens, tokenizer.fingerprint)
            sources.append(Questions(dataset, tokenizer))
            questions += sources[-1].choose(
                config.train.evaluation_questions,
                number,
                config.model,
                PixelLimits.of(config.data),
                max_tokens=config.train.seq_len,
                max_patches=config.data.max_patches,
            )
        return cls(sources, questions, tokenizer)

    def read(self, config: Config, mesh: Mesh) -> tuple[list[QuestionBatch], dict[int, str]]:
        """This dp rank's questions, at least one; and of those whose media cannot be read, why.

        The second is known to the rank that reads media alone.
        """
        every = range(len(self.questions))
        mine = every[mesh.dp_rank :: mesh.dims.dp] or every[:1]
        batches = self._packed(mine, config)
        packs = [[self._pack(numbers)] for numbers in batches]
        reader = Reader(
            self.sources, batch_format(config, mesh), num_workers=config.data.num_workers
        )
        with closing(reader):
            step = reader.read(packs)
        unreadable = {batches[u.microbatch][u.segment]: u.reason for u in step.unreadable}
        read = [
            QuestionBatch(numbers, batch, max(self.questions[i].num_answer_tokens for i in numbers))
            for numbers, batch in zip(batches, step.microbatches, strict=True)
        ]
        return read, unreadable

    def _packed(self, numbers: Sequence[int], config: Config) -> list[list[int]]:
        """In order, as many together as a pack of training holds, their answers included."""
        batches: list[list[int]] = []
        tokens = patches = 0
        for number in numbers:
            question = self.questions[number]
            more = question.num_tokens + question.num_answer_tokens
            tokens, patches = tokens + more, patches + question.num_patches
            full = tokens > config.train.seq_len or patches > config.data.max_patches
            if full or not batches:
                batches.append([])
                tokens, patches = more, question.num_patches
            batches[-1].append(number)
        return batches

    def _pack(self, numbers: Sequence[int]) -> Pack:
        questions = [self.questions[number] for number in numbers]
        return Pack(
            number=0,
            samples=tuple(question.sample_id for question in questions),
            num_tokens=sum(question.num_tokens for question in questions),
            num_patches=sum(question.num_patches for question in questions),
        )

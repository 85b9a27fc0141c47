"""Questions with their answers, out of datasets: chats, cut where the assistant first speaks.

What is asked is every turn before, with its media; what is expected is the whole first answer.
Samples that are no chats, as documents, are passed over, and so are questions that fit no pack.
"""

from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from triptych.configs.model_schema import ModelConfig, VisionConfig
from triptych.data.media.kinds import kind_of
from triptych.data.plan.permute import derive_key, shuffled
from triptych.data.tokenizer import Tokenizer
from triptych.data.tokens import placeholders
from triptych.data.types import Media, PixelLimits, Sample, SampleId, Sizes, Source
from triptych.errors import DataError

LOOKED_AT = 100
"""Samples per question that are looked at, before it is said that there are no more chats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """One question."""

    sample_id: SampleId
    source: str
    prompt: str
    """The last turn before the answer, without its media."""
    expected: str
    num_answer_tokens: int
    """Of the expected one, with its end."""
    num_tokens: int
    """Of what is asked, placeholders repeated."""
    num_patches: int


class Questions:
    """A dataset whose samples end before the answer; a ``Source``."""

    def __init__(self, dataset: Source, tokenizer: Tokenizer) -> None:
        self.name = dataset.name
        self._dataset, self._tokenizer = dataset, tokenizer
        self._opening = [tokenizer.tokens.im_start, *tokenizer.encode("assistant\n")]

    def __len__(self) -> int:
        return len(self._dataset)

    def sizes(self, limits: PixelLimits, vision: VisionConfig) -> Sizes:
        """Those of the whole samples."""
        return self._dataset.sizes(limits, vision)

    def read_media(self, media: Media) -> bytes:
        """The encoded file."""
        return self._dataset.read_media(media)

    def read_span(self, media: Media, size: int) -> bytes:
        """``size`` bytes of its shard from where a file begins, not compared with any hash."""
        return self._dataset.read_span(media, size)

    def sample(self, index: int) -> Sample:
        """What is asked; nothing is a target.

        Raises:
            DataError: the sample is no chat.
        """
        cut = self._cut(index)
        if cut is None:
            raise DataError(f"{self.name}, sample {index} is no chat")
        return cut[0]

    def choose(
        self,
        number: int,
        source: int,
        model: ModelConfig,
        limits: PixelLimits,
        *,
        max_tokens: int,
        max_patches: int,
    ) -> list[HeldOut]:
        """Questions from all over the dataset, the same ones in every run.

        Args:
            number: how many; fewer where not as many are found.
            source: number of this one.
            model: of the run.
            limits: of the run.
            max_tokens: of a question with its answer.
            max_patches: of a question.

        Raises:
            DataError: there are none.
        """
        places = np.arange(min(len(self), LOOKED_AT * number), dtype=np.int64)
        chosen: list[HeldOut] = []
        for index in shuffled(places, len(self), derive_key(0, "questions")).tolist():
            found = self._question(SampleId(source, index), model, limits)
            if found is None or found.num_patches > max_patches:
                continue
            if found.num_tokens + found.num_answer_tokens <= max_tokens:
                chosen.append(found)
            if len(chosen) == number:
                break
        if not chosen:
            raise DataError(
                f"none of {len(places):,} samples of {self.name} is a chat that fits a pack: there "
                "is nothing to ask  -> in data.evaluation, name sources whose records have messages"
            )
        return chosen

    def _cut(self, index: int) -> tuple[Sample, NDArray[np.int32]] | None:
        """What is asked, and the ids of what is answered; None of what is no chat."""
        whole = self._dataset.sample(index)
        ids, is_target = whole.input_ids, whole.targets
        start = int(is_target.argmax())
        if ids[:start][-len(self._opening) :].tolist() != self._opening:
            return None
        num_media = int(placeholders(ids[:start], self._tokenizer.tokens).sum())
        asked = Sample(ids[:start], np.zeros(start, np.uint8), whole.media[:num_media])
        end = start + int(np.append(is_target[start:], 0).argmin())
        return asked, ids[start:end]

    def _question(
        self, sample_id: SampleId, model: ModelConfig, limits: PixelLimits
    ) -> HeldOut | None:
        if (cut := self._cut(sample_id.index)) is None:
            return None
        asked, answer = cut
        grids = [kind_of(media.kind).grid(media, limits, model.vision) for media in asked.media]
        num_patches = sum(int(np.prod(grid)) for grid in grids)
        num_merged = num_patches // model.vision.patches_per_token
        tokens = self._tokenizer.tokens
        ended = len(answer) > 0 and answer[-1] == tokens.im_end
        return HeldOut(
            sample_id=sample_id,
            source=self.name,
            prompt=self._last_turn(asked.input_ids),
            expected=self._tokenizer.decode(answer[: len(answer) - ended].tolist()),
            num_answer_tokens=len(answer),
            num_tokens=len(asked.input_ids) - len(grids) + num_merged,
            num_patches=num_patches,
        )

    def _last_turn(self, ids: NDArray[np.int32]) -> str:
        """The text of the turn before the assistant's, for people."""
        tokens = self._tokenizer.tokens
        begin = int(np.flatnonzero(ids == tokens.im_start)[-2])
        turn = ids[begin + 1 : -len(self._opening)]
        special = set(astuple(tokens))
        shown = [i for i in turn.tolist() if i not in special]
        return self._tokenizer.decode(shown).partition("\n")[2].strip()

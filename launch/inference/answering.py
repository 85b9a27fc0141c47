"""A trained model that answers about images, videos and text: what sample.py and the demo ask."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from triptych.checkpoints.hf.origin import origin_of
from triptych.checkpoints.layout import CheckpointFolder
from triptych.checkpoints.locate import locate
from triptych.checkpoints.model_file import read_model
from triptych.checkpoints.run_state import RunTensors, load_weights
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.data.chat import encode_prompt
from triptych.data.loading.collate import Segment
from triptych.data.media.image import cut_patches
from triptych.data.media.kinds import kind_of
from triptych.data.tokenizer import Tokenizer, load_tokenizer
from triptych.data.tokens import expand
from triptych.data.types import Media, MediaKind, PixelLimits, Sample, SampleId
from triptych.models.build import build_model
from triptych.models.generate import greedy
from triptych.models.kernels import choose_here
from triptych.models.parameters import global_parameters
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.parallel.agree import SingleProcess
from triptych.parallel.dtypes import DTYPES
from triptych.parallel.mesh import build_mesh, init_distributed

TIMEOUT_S = 600
BATCH = 32
"""Questions that go through the model together."""
INCOMPLETE = "\ufffd"
"""What the bytes of half a character decode to."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a person asks, about one image or video, or about none."""

    file: bytes | None
    """The encoded image or video."""
    prompt: str
    where: str
    """Names the file in errors."""
    kind: MediaKind = MediaKind.IMAGE
    """What the file is."""

    def messages(self) -> list[dict[str, object]]:
        """The question as a chat."""
        name = kind_of(self.kind).name
        shown = [] if self.file is None else [{"type": name, name: self.where}]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.prompt}]}]


@dataclass(frozen=True, slots=True)
class Answerer:
    """The whole model in this process, with its tokenizer and the resolution it trained at."""

    model: nn.Module
    config: ModelConfig
    tokenizer: Tokenizer
    limits: PixelLimits

    @classmethod
    def load(
        cls, checkpoint: Path, tokenizer: Path, precision: Precision | None = None
    ) -> "Answerer":
        """Load the weights of a run, or those that were imported.

        Args:
            checkpoint: a run folder, its ``checkpoints``, or one checkpoint, of any layout.
            tokenizer: the folder that the run was given.
            precision: that of the weights, where none is asked for.

        Raises:
            CheckpointError: there is no good checkpoint.
            ConfigError: no tokenizer.
        """
        folder = locate(checkpoint, SingleProcess())
        sizes, limits = read_model(folder), origin_of(folder).limits
        loaded = load_tokenizer(tokenizer)
        init_distributed(TIMEOUT_S)
        mesh = build_mesh(1, 1, seed=0, timeout_s=TIMEOUT_S)
        if precision is None:
            stored = StoredTensors.open(CheckpointFolder(folder).shards, mesh.world)
            precision = next(p for p in Precision if DTYPES[p] == stored.weights_dtype)
        layers = [sizes.language.num_layers]
        kernels = choose_here(Kernels.auto, precision)
        [model] = build_model(sizes, ParallelConfig(), precision, layers, mesh, kernels)
        parameters = dict(global_parameters([model]))
        load_weights(folder, RunTensors(parameters, None, sharding_table(sizes), mesh))
        return cls(model.eval(), sizes, loaded, limits)

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[list[int]]:
        """Ids of each greedy answer, without the token that ends it."""
        prompts = [self.prompt(question) for question in questions]
        answers: list[list[int]] = []
        for start in range(0, len(prompts), BATCH):
            answers += greedy(
                self.model,
                prompts[start : start + BATCH],
                self.config,
                max_new_tokens=max_new_tokens,
            )
        return answers

    def stream(
        self, question: Question, *, max_new_tokens: int, write: Callable[[str], None]
    ) -> None:
        """Answer one question, and ``write`` the text as it comes."""
        ids: list[int] = []
        written = 0

        def tell(_: int, token: int) -> None:
            nonlocal written
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith(INCOMPLETE):
                write(text[written:])
                written = len(text)

        prompt = self.prompt(question)
        greedy(self.model, [prompt], self.config, max_new_tokens=max_new_tokens, tell=tell)
        write(self.tokenizer.decode(ids)[written:])

    def read(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[str]:
        """The answers as text."""
        ids = self.answer(questions, max_new_tokens=max_new_tokens)
        return [self.tokenizer.decode(answer) for answer in ids]

    def prompt(self, question: Question) -> Segment:
        """The chat up to where the answer begins, with the patches of what is asked about.

        Raises:
            DataError: the file cannot be decoded.
        """
        encoded = encode_prompt(question.messages(), self.tokenizer)
        media, grids, patches = [], [], []
        if question.file is not None:
            data, kind, where = question.file, kind_of(question.kind), question.where
            size = kind.measure(data, where)._asdict()
            item = Media(question.kind, shard=0, offset=0, size=len(data), xxh3=b"", **size)
            geometry = (item, self.limits, self.config.vision)
            frames = kind.frames(data, item, kind.shape(*geometry), where)
            grids, patches = [kind.grid(*geometry)], [cut_patches(frames, self.config.vision)]
            media = [item]
        sample = Sample(encoded.input_ids, encoded.targets, tuple(media))
        input_ids, targets = expand(sample, grids, self.config)
        shapes = np.array(grids, np.int64).reshape(-1, 3)
        return Segment(SampleId(0, 0), input_ids, targets, shapes, tuple(patches))

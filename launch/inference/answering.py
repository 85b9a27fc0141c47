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
from triptych.configs.problems import Problem, refusal
from triptych.configs.rules.parallel import check_ranks, check_split, even_layers
from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.data.chat import encode_prompt
from triptych.data.loading.collate import Segment, collate
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
from triptych.parallel.agree import ProcessGroupRanks
from triptych.parallel.dtypes import DTYPES
from triptych.parallel.mesh import Mesh, build_mesh, init_distributed

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
    """This rank's part of the model, with its tokenizer and the resolution it trained at."""

    chunks: Sequence[nn.Module]
    config: ModelConfig
    mesh: Mesh
    tokenizer: Tokenizer
    limits: PixelLimits

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        tokenizer: Path,
        precision: Precision | None = None,
        *,
        tp: int = 1,
        pp: int = 1,
    ) -> "Answerer":
        """Load the weights of a run, or those that were imported. Every rank must call this.

        Args:
            checkpoint: a run folder, its ``checkpoints``, or one checkpoint, of any layout.
            tokenizer: the folder that the run was given.
            precision: that of the weights, where none is asked for.
            tp: ranks that share each layer.
            pp: ranks that share the layers; over the ranks left, dp, questions are shared out.

        Raises:
            CheckpointError: there is no good checkpoint.
            ConfigError: no tokenizer, or ranks that the model cannot be shared by.
        """
        world_size = init_distributed(TIMEOUT_S)
        folder = locate(checkpoint, ProcessGroupRanks())
        sizes, limits = read_model(folder), origin_of(folder).limits
        _refuse_ranks(sizes, world_size, tp, pp)
        loaded = load_tokenizer(tokenizer)
        mesh = build_mesh(tp, pp, seed=0, timeout_s=TIMEOUT_S)
        if precision is None:
            stored = StoredTensors.open(CheckpointFolder(folder).shards, mesh.world)
            precision = next(p for p in Precision if DTYPES[p] == stored.weights_dtype)
        layers = even_layers(sizes.language.num_layers, pp)
        kernels = choose_here(Kernels.auto, precision)
        parallel = ParallelConfig(tp=tp, pp=pp)
        chunks = build_model(sizes, parallel, precision, layers, mesh, kernels)
        parameters = dict(global_parameters(chunks))
        load_weights(folder, RunTensors(parameters, None, sharding_table(sizes), mesh))
        return cls([chunk.eval() for chunk in chunks], sizes, mesh, loaded, limits)

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[list[int]]:
        """Ids of each greedy answer, without the token that ends it.

        Every rank must call this with the same questions, and gets all answers.
        """
        mesh, size = self.mesh, BATCH * self.mesh.dims.pp
        mine = range(mesh.dp_rank, len(questions), mesh.dims.dp)
        answers: list[list[int]] = []
        for start in range(0, len(mine), size):
            prompts = [self.prompt(questions[i]) for i in mine[start : start + size]]
            answers += self._continue(prompts, max_new_tokens)
        found = dict(zip(mine, answers, strict=True))
        if mesh.dims.dp > 1:
            found = {i: ids for each in mesh.world.all_gather(found) for i, ids in each.items()}
        return [found[i] for i in range(len(questions))]

    def _continue(
        self,
        prompts: Sequence[Segment],
        max_new_tokens: int,
        tell: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Every rank of this replica must call this."""
        mesh, reads = self.mesh, self.mesh.reads_media
        batches = [
            collate(
                prompts[start : start + BATCH], self.config, pad_to=mesh.dims.tp, with_pixels=reads
            )
            for start in range(0, len(prompts), BATCH)
        ]
        return greedy(
            self.chunks, batches, self.config, mesh, max_new_tokens=max_new_tokens, tell=tell
        )

    def stream(
        self, question: Question, *, max_new_tokens: int, write: Callable[[str], None]
    ) -> None:
        """Answer one question, and ``write`` the text as it comes. Every rank must call this."""
        ids: list[int] = []
        written = 0

        def tell(_: int, token: int) -> None:
            nonlocal written
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith(INCOMPLETE):
                write(text[written:])
                written = len(text)

        self._continue([self.prompt(question)], max_new_tokens, tell)
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


def _refuse_ranks(sizes: ModelConfig, world_size: int, tp: int, pp: int) -> None:
    """Refuse ranks that the model cannot be shared by.

    Raises:
        ConfigError: lists what does not divide.
    """
    num_layers = sizes.language.num_layers
    problems = [
        *check_ranks(world_size, tp, pp, keys=("--tp", "--pp")),
        *check_split(sizes, tp, "--tp"),
    ]
    if pp > num_layers:
        problems.append(Problem(f"--pp={pp} must be at most {num_layers} layers", "a smaller --pp"))
    if problems:
        raise refusal(problems)

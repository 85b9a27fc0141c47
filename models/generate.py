"""Greedy decoding over packed prompts, in any layout.

Prompts go through the model by the very forward pass that training runs, then one token of each,
which attends to the keys and values that were kept. Each batch of prompts is a microbatch of the
pipeline: as many batches as stages keep all of them busy.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.configs.model_schema import ModelConfig
from triptych.data.batch import Batch
from triptych.data.patch_layout import PatchLayout
from triptych.models.feed import on_device
from triptych.models.kv_cache import KeyValueCache
from triptych.parallel.device import Upload
from triptych.parallel.mesh import Mesh
from triptych.parallel.schedule import run_microbatches


@torch.no_grad()
def greedy(
    chunks: Sequence[nn.Module],
    batches: Sequence[Batch],
    config: ModelConfig,
    mesh: Mesh,
    *,
    max_new_tokens: int,
    tell: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt with its most likely tokens.

    Every rank of ``mesh.model_group`` must call this with the same prompts; dp ranks may have other
    ones.

    Args:
        chunks: of the model on this rank, bare or wrapped for data parallelism.
        batches: of prompts, at least one in each, padded to a multiple of tp; on the CPU.
        config: of the model.
        mesh: this rank's place.
        max_new_tokens: an answer is cut there.
        tell: is given the number of a prompt and its next id, as they come.

    Returns:
        The new ids of each prompt, up to and without ``<|im_end|>`` or ``<|endoftext|>``.
    """
    groups = [_Group(batch, config, mesh.dims.tp) for batch in batches]
    if len(chunks) > 1:  # interleaved, they go by as many as there are stages
        more = -len(groups) % mesh.dims.pp
        groups += [_Group(batches[0], config, mesh.dims.tp) for _ in range(more)]
    for _ in range(max_new_tokens):
        for group, ids in zip(groups, _next_ids(chunks, groups, mesh), strict=True):
            group.take(ids)
        if tell is not None:
            _tell_newest(groups[: len(batches)], tell)
        if not any(group.is_open for group in groups):
            break
    return [answer for group in groups[: len(batches)] for answer in group.answers]


class _Group:
    """Prompts that go through the model together, and how far they have been answered."""

    def __init__(self, prompts: Batch, config: ModelConfig, tp: int) -> None:
        num_prompts = len(prompts.sample_ids)
        self.answers: list[list[int]] = [[] for _ in range(num_prompts)]
        self.batch = prompts
        """What goes through the model next."""
        self.cache = KeyValueCache(range(num_prompts))
        self._is_open = [True] * num_prompts
        self._config, self._tp = config, tp
        self._positions = [
            int(prompts.position_ids[:, start:end].max())
            for start, end in pairwise(prompts.segments)
        ]

    @property
    def is_open(self) -> bool:
        """Whether any of its answers has not ended."""
        return any(self._is_open)

    def take(self, next_ids: Sequence[int]) -> None:
        """Add a token to each answer that has not ended; padding has one too, which is nothing."""
        tokens = self._config.tokens
        newest = dict(zip(self.cache.slots, next_ids, strict=False))
        for slot, token in newest.items():
            self._is_open[slot] &= token not in (tokens.im_end, tokens.endoftext)
            if self._is_open[slot]:
                self.answers[slot].append(token)
        # One whose answers have all ended keeps a place, as microbatches may be needed in number.
        going_on = [slot for slot in newest if self._is_open[slot]] or [min(newest)]
        self.cache.slots = going_on
        self.batch = self._one_token_each([newest[slot] for slot in going_on])

    def _one_token_each(self, ids: Sequence[int]) -> Batch:
        """Segments of one token that follow prompts; text, whatever token it is."""
        for slot in self.cache.slots:
            self._positions[slot] += 1
        positions = [self._positions[slot] for slot in self.cache.slots]
        num_padding = -len(ids) % self._tp
        bounds = [*range(len(ids) + 1), *[len(ids) + num_padding] * (num_padding > 0)]
        ids_T = torch.tensor([*ids, *[self._config.tokens.endoftext] * num_padding])
        no_media = self.batch.grid_thw[:0]
        return replace(
            self.batch,
            input_ids=ids_T,
            labels=ids_T,
            loss_mask=torch.zeros(len(ids_T), dtype=torch.bool),
            supervised_index=self.batch.supervised_index[:0],
            position_ids=torch.tensor([*positions, *[0] * num_padding]).expand(3, -1),
            segments=bounds,
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            grid_thw=no_media,
            patches=PatchLayout.of(no_media, self._config.vision),
            vision_index=self.batch.vision_index[:0],
            pixel_values=None,
            num_tokens=len(ids),
            num_patches=0,
        )


def _next_ids(chunks: Sequence[nn.Module], groups: Sequence[_Group], mesh: Mesh) -> list[list[int]]:
    """The next token of each segment of each group; every stage gets what the last one found."""

    def forward(chunk: nn.Module, fed: tuple[Batch, KeyValueCache]) -> tuple[Tensor, None]:
        batch, cache = fed
        return chunk(batch, cache=cache), None

    batches, caches = [group.batch for group in groups], [group.cache for group in groups]
    places = mesh.places(len(chunks))
    feeds = [zip(on_device(batches, mesh, place), caches, strict=True) for place in places]
    lengths = [len(batch.input_ids) for batch in batches]
    found: list[Tensor] = run_microbatches(chunks, feeds, lengths, forward, mesh, forward_only=True)
    counts = [len(batch.segments) - 1 for batch in batches]
    nothing = torch.zeros(sum(counts), dtype=torch.int64, device=mesh.device)
    ids = torch.cat(found) if found else nothing
    dist.all_reduce(ids, group=mesh.pp_group)
    return [part.tolist() for part in ids.split(counts)]


def _tell_newest(groups: Sequence[_Group], tell: Callable[[int, int], None]) -> None:
    start = 0
    for group in groups:
        for slot in group.cache.slots:
            if group.is_open:
                tell(start + slot, group.answers[slot][-1])
        start += len(group.answers)


@torch.no_grad()
def next_logits(model: nn.Module, batch: Batch) -> Tensor:
    """(num_segments, vocab): what the model thinks of the token after each segment.

    Args:
        model: whole, in this process.
        batch: on the CPU.
    """
    upload = Upload(next(model.parameters()).device)
    moved, last_S = batch.each(upload), upload(torch.tensor(batch.segments[1:]) - 1)
    upload.wait()
    logits_TV: Tensor = model(moved, with_loss=False).squeeze(0)
    return logits_TV[last_S]

"""Parameters under names that no layout changes: their part, and how tp cuts them."""

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn


class Part(Enum):
    """A part of the model that trains or is frozen as a whole."""

    VIT = "vit"
    ADAPTER = "adapter"
    LLM = "llm"


class Cut(Enum):
    """How tensor parallelism cuts a full tensor."""

    REPLICATED = "replicated"
    ROWS = "rows"
    """Along dim 0: column-parallel linear layers, embedding and head."""
    COLUMNS = "columns"
    """Along dim 1: row-parallel linear layers."""
    GATED_ROWS = "gated_rows"
    """Along dim 0 of each half: [gate; up] becomes [gate_r; up_r] on rank r."""


_PART_PREFIXES = {"vision.": Part.VIT, "merger.": Part.ADAPTER, "language.": Part.LLM}


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its global name."""
    return next(part for prefix, part in _PART_PREFIXES.items() if name.startswith(prefix))


def cut_of(name: str) -> Cut:
    """How tensor parallelism cuts a parameter, by its global name."""
    module, leaf = name.split(".")[-2:]
    if name.startswith("language.") and module == "linear_fc1":
        return Cut.GATED_ROWS
    if module in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer"):
        return Cut.ROWS
    if module in ("linear_proj", "linear_fc2") and leaf == "weight":
        return Cut.COLUMNS
    return Cut.REPLICATED


def cut_full(full: Tensor, cut: Cut, tp_rank: int, tp: int) -> Tensor:
    """The piece of a full tensor that lies on ``tp_rank``."""
    if tp == 1 or cut is Cut.REPLICATED:
        return full
    if cut is Cut.GATED_ROWS:
        return torch.cat([half.chunk(tp)[tp_rank] for half in full.chunk(2)])
    return full.chunk(tp, dim=1 if cut is Cut.COLUMNS else 0)[tp_rank]


def join_pieces(pieces: Sequence[Tensor], cut: Cut) -> Tensor:
    """The full tensor, from its pieces in order of tp rank."""
    if len(pieces) == 1 or cut is Cut.REPLICATED:
        return pieces[0]
    if cut is Cut.GATED_ROWS:
        halves = [piece.chunk(2) for piece in pieces]
        return torch.cat([half[side] for side in (0, 1) for half in halves])
    return torch.cat(list(pieces), dim=1 if cut is Cut.COLUMNS else 0)


def full_shape(piece: Tensor, cut: Cut, tp: int) -> tuple[int, ...]:
    """The shape of the full tensor that ``piece`` was cut from."""
    shape = list(piece.shape)
    if cut in (Cut.ROWS, Cut.GATED_ROWS):
        shape[0] *= tp
    elif cut is Cut.COLUMNS:
        shape[1] *= tp
    return tuple(shape)


def mark_cuts(model: nn.Module) -> None:
    """Tell megatron-core which parameters are pieces: replicas count once in the gradient norm.

    megatron-core marks them while it initialises weights; we initialise them ourselves
    (models/init.py), so we mark them too.
    """
    for name, parameter in model.named_parameters():
        cut = cut_of(name)
        if cut is not Cut.REPLICATED:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # megatron's mark
            parameter.partition_dim = 1 if cut is Cut.COLUMNS else 0  # type: ignore[attr-defined]
            parameter.partition_stride = 2 if cut is Cut.GATED_ROWS else 1  # type: ignore[attr-defined]


def global_parameters(chunks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters; decoder layers are counted from the whole model's first."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            yield _global_name(chunk, name), parameter


def _global_name(model: nn.Module, name: str) -> str:
    prefix, found, rest = name.partition(".decoder.layers.")
    if not found:
        return name
    index, _, leaf = rest.partition(".")
    layers: Any = model.get_submodule(f"{prefix}.decoder.layers")
    return f"{prefix}.decoder.layers.{layers[int(index)].layer_number - 1}.{leaf}"

"""Parameters under names that no layout changes: their part, and how tp shards them."""

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


class TensorSharding(Enum):
    """How tensor parallelism shards a full tensor."""

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


def sharding_of(name: str) -> TensorSharding:
    """How tensor parallelism shards a parameter, by its global name."""
    module, leaf = name.split(".")[-2:]
    if name.startswith("language.") and module == "linear_fc1":
        return TensorSharding.GATED_ROWS
    if module in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer"):
        return TensorSharding.ROWS
    if module in ("linear_proj", "linear_fc2") and leaf == "weight":
        return TensorSharding.COLUMNS
    return TensorSharding.REPLICATED


def shard(full: Tensor, sharding: TensorSharding, tp_rank: int, tp: int) -> Tensor:
    """The piece of a full tensor that lies on ``tp_rank``."""
    if tp == 1 or sharding is TensorSharding.REPLICATED:
        return full
    if sharding is TensorSharding.GATED_ROWS:
        return torch.cat([half.chunk(tp)[tp_rank] for half in full.chunk(2)])
    return full.chunk(tp, dim=1 if sharding is TensorSharding.COLUMNS else 0)[tp_rank]


def unshard(pieces: Sequence[Tensor], sharding: TensorSharding) -> Tensor:
    """The full tensor, from its pieces in order of tp rank."""
    if len(pieces) == 1 or sharding is TensorSharding.REPLICATED:
        return pieces[0]
    if sharding is TensorSharding.GATED_ROWS:
        halves = [piece.chunk(2) for piece in pieces]
        return torch.cat([half[side] for side in (0, 1) for half in halves])
    return torch.cat(list(pieces), dim=1 if sharding is TensorSharding.COLUMNS else 0)


def full_shape(piece: Tensor, sharding: TensorSharding, tp: int) -> tuple[int, ...]:
    """The shape of the full tensor that ``piece`` is a shard of."""
    shape = list(piece.shape)
    if sharding in (TensorSharding.ROWS, TensorSharding.GATED_ROWS):
        shape[0] *= tp
    elif sharding is TensorSharding.COLUMNS:
        shape[1] *= tp
    return tuple(shape)


def mark_sharding(model: nn.Module) -> None:
    """Tell megatron-core which parameters are pieces: replicas count once in the gradient norm.

    megatron-core marks them while it initialises weights; we initialise them ourselves
    (models/init.py), so we mark them too.
    """
    for name, parameter in model.named_parameters():
        sharding = sharding_of(name)
        if sharding is not TensorSharding.REPLICATED:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # megatron's mark
            parameter.partition_dim = 1 if sharding is TensorSharding.COLUMNS else 0  # type: ignore[attr-defined]
            parameter.partition_stride = 2 if sharding is TensorSharding.GATED_ROWS else 1  # type: ignore[attr-defined]


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

"""How tensor parallelism shards a full tensor, and the table that says it of every parameter."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
from torch import Tensor


class TensorSharding(Enum):
    """How tensor parallelism shards a full tensor."""

    REPLICATED = "replicated"
    ROWS = "rows"
    """Along dim 0: column-parallel linear layers, embedding and head."""
    COLUMNS = "columns"
    """Along dim 1: row-parallel linear layers."""
    GATED_ROWS = "gated_rows"
    """Along dim 0 of each half: [gate; up] becomes [gate_r; up_r] on rank r."""


@dataclass(frozen=True, slots=True)
class ShardingTable:
    """How each parameter of one model lies over the ranks, by its global name.

    Nothing is guessed: a parameter that the model's description does not name has no place, as a
    gated matrix taken for a plain one would have the right shape and the wrong rows.
    """

    patterns: Mapping[str, TensorSharding]
    """Name, with ``*`` for the number of a layer -> how tp shards it."""
    tied: bool
    """The head is the embedding, also where both lie on different pp stages."""

    def __getitem__(self, name: str) -> TensorSharding:
        """How tp shards a parameter.

        Raises:
            KeyError: the model has no such parameter.
        """
        pattern = pattern_of(name)
        if pattern not in self.patterns:
            raise KeyError(
                f"{name} is no parameter of this model: how tp shards it is not known"
                "  -> name it in models/qwen_vl/sharding_table.py"
            )
        return self.patterns[pattern]


@cache
def pattern_of(name: str) -> str:
    """A name, or a line about one, without the number of its layer: the same for all layers."""
    return re.sub(r"\.layers\.\d+\.", ".layers.*.", name)


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

"""How one of our tensors is made of tensors of a Hugging Face checkpoint, and back.

A transform knows head sizes but no number of heads: it works on full tensors and on the pieces of a
tp rank alike. Cutting the Hugging Face tensors first and transforming then gives the same as
transforming first and cutting then, so a rank reads no more than its own piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transform(Protocol):
    """A bijection between tensors of theirs and one of ours."""

    @property
    def blocks(self) -> int:
        """Stacked blocks along dim 0 of each of their tensors, each of which tp cuts by itself."""

    @property
    def told(self) -> str:
        """What it does to their tensors, in a few words."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """Our tensor, or this tp rank's piece of it."""

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Their tensors, in the order that ``to_ours`` takes them."""


@dataclass(frozen=True, slots=True)
class Same:
    """The same tensor under another name."""

    blocks: int = 1
    told: str = "renamed"

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """Itself."""
        return theirs[0]

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Itself."""
        return (ours,)


@dataclass(frozen=True, slots=True)
class Flatten:
    """A convolution whose kernel is as large as its stride, as a linear map over flat patches."""

    kernel: tuple[int, ...]
    """(channels, frames, height, width)."""
    blocks: int = 1
    told: str = "flattened"

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """(E, C, 2, 14, 14) -> (E, C * 2 * 14 * 14)."""
        return theirs[0].flatten(1)

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """(E, C * 2 * 14 * 14) -> (E, C, 2, 14, 14)."""
        return (ours.reshape(-1, *self.kernel),)


@dataclass(frozen=True, slots=True)
class SpreadOverFrames:
    """A patch embedding of pictures as one of several frames: an equal share of it for each.

    A picture is that many identical frames, so what comes of it stays the same.
    """

    kernel: tuple[int, ...]
    """(channels, frames, height, width)."""
    blocks: int = 1
    told: str = "an equal share for each frame"

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """(E, C, 14, 14) -> (E, C * frames * 14 * 14)."""
        share = theirs[0].unsqueeze(2) / self.kernel[1]
        return share.expand(-1, *self.kernel).flatten(1)

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """(E, C * frames * 14 * 14) -> (E, C, 14, 14): what a picture sees."""
        return (ours.reshape(-1, *self.kernel).sum(2),)


@dataclass(frozen=True, slots=True)
class VisionQKV:
    """Rows [3, heads, head_dim] of theirs as [heads, 3, head_dim], each head's together."""

    head_dim: int
    blocks: int = 3
    told: str = "rows by head"

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """(3 * heads * head_dim, ...), q of all heads first -> the same shape, head by head."""
        rows = theirs[0].reshape(3, -1, self.head_dim, *theirs[0].shape[1:])
        return rows.transpose(0, 1).flatten(0, 2)

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """The same shape, head by head -> q of all heads first."""
        rows = ours.reshape(-1, 3, self.head_dim, *ours.shape[1:])
        return (rows.transpose(0, 1).flatten(0, 2),)


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """q, k and v of theirs as megatron-core's rows [kv heads, (q heads, k, v), head_dim]."""

    heads_per_group: int
    """q heads that share a kv head."""
    head_dim: int
    blocks: int = 1
    told: str = "rows by head"

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """(heads * head_dim, ...), twice (kv heads * head_dim, ...) -> all rows, group by group."""
        groups = [
            x.reshape(-1, rows, *x.shape[1:]) for x, rows in zip(theirs, self._rows, strict=True)
        ]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Rows, group by group -> q, k, v."""
        groups = ours.reshape(-1, sum(self._rows), *ours.shape[1:])
        return tuple(x.flatten(0, 1) for x in torch.split(groups, self._rows, dim=1))

    @property
    def _rows(self) -> list[int]:
        """Rows of q, k and v in one group."""
        return [self.heads_per_group * self.head_dim, self.head_dim, self.head_dim]


@dataclass(frozen=True, slots=True)
class GateUp:
    """Gate and up projection of theirs as one matrix [gate; up]."""

    blocks: int = 1
    told: str = "joined"

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """Twice (F, H) -> (2 * F, H)."""
        return torch.cat(list(theirs))

    def to_theirs(self, ours: Tensor) -> tuple[Tensor, ...]:
        """(2 * F, H) -> twice (F, H)."""
        return ours.chunk(2)

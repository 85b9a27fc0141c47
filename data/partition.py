"""A sequence cut into pieces, each of which attends within itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Partition:
    """Where the pieces begin, as the host needs it and as kernels do."""

    bounds: list[int]
    """(num_pieces + 1,) starts at 0, ends at the length of the sequence."""
    cu_seqlens: Tensor
    """The same, int32; on the device when a kernel takes it."""

    @classmethod
    def of(cls, bounds: list[int]) -> Self:
        """On the CPU."""
        return cls(bounds, torch.tensor(bounds, dtype=torch.int32))

    def extended(self, end: int) -> "Partition":
        """With one more piece, up to ``end``. The host does not wait for the device."""
        return Partition([*self.bounds, end], F.pad(self.cu_seqlens, (0, 1), value=end))

    def each(self, function: Callable[[Tensor], Tensor]) -> "Partition":
        """The same, its tensor moved."""
        return Partition(self.bounds, function(self.cu_seqlens))

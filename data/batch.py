"""What travels from the loader to the model: batches, steps, and what of them was unreadable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triptych.costs.flops import Workload
from triptych.data.patch_layout import PatchLayout
from triptych.data.types import SampleId


@dataclass(slots=True)
class Batch:
    """One microbatch.

    Packs joined into one sequence of segments ("thd"). Made on the CPU by the loader.
    """

    input_ids: Tensor
    """(T,) int64. T is a multiple of ``pad_to``; padding is its own last segment."""
    labels: Tensor
    """(T,) int64, already shifted: labels[t] = input_ids[t + 1]."""
    loss_mask: Tensor
    """(T,) bool, True = counts. False at each segment's last position. Stays on the CPU, and is
    changed by ``leave_out`` only."""
    supervised_index: Tensor
    """(num_supervised_tokens,) int64: the positions that count in the loss."""
    position_ids: Tensor
    """(3, T) int64, M-RoPE; restarts at 0 in every segment."""
    segments: list[int]
    """(num_segments + 1,) where segments begin: starts at 0, ends at T."""
    cu_seqlens: Tensor
    """The same for kernels, int32."""
    grid_thw: Tensor
    """(num_media, 3) int64, in unmerged patches, in order of appearance. Stays on the CPU."""
    patches: PatchLayout
    """Follows from ``grid_thw``."""
    vision_index: Tensor
    """(num_merged,) int64: the positions in ``input_ids`` that the merged patches take."""
    pixel_values: Tensor | None
    """(num_patches, patch_dim) uint8 in patch order, not yet normalised.

    None where no pixels are read.
    """
    patch_dim: int
    """Numbers in a patch, also where no pixels are read."""
    sample_ids: tuple[SampleId, ...]
    """One per segment, padding excepted."""
    num_tokens: int
    """Padding not counted."""
    num_patches: int

    @property
    def workload(self) -> Workload:
        """What the FLOPs of the batch follow from, padding excepted, as the loss mask is now."""
        lengths = [end - start for start, end in pairwise(self.segments)][: len(self.sample_ids)]
        frames, height, width = self.grid_thw.unbind(dim=1)
        return Workload(
            num_tokens=self.num_tokens,
            token_pairs=sum(length**2 for length in lengths),
            num_patches=self.num_patches,
            patch_pairs=int((frames * (height * width).square()).sum()),
            num_supervised_tokens=self.num_supervised_tokens,
        )

    def by_source(self, num_sources: int) -> NDArray[np.int64]:
        """(3, num_sources) samples, tokens and supervised tokens of each. While on the CPU."""
        sources = [sample.source for sample in self.sample_ids]
        ends = np.searchsorted(self.supervised_index.numpy(), self.segments)
        counts = np.zeros((3, num_sources), dtype=np.int64)
        np.add.at(counts[0], sources, 1)
        for row, bounds in zip(counts[1:], (np.array(self.segments), ends), strict=True):
            np.add.at(row, sources, np.diff(bounds)[: len(sources)])
        return counts

    @property
    def num_with_media(self) -> int:
        """Samples that have media. While on the CPU."""
        ends = torch.tensor(self.segments[1:])
        return len(torch.bucketize(self.vision_index, ends, right=True).unique())

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that count in the loss."""
        return len(self.supervised_index)

    def leave_out(self, start: int, end: int) -> None:
        """Take the tokens from ``start`` up to ``end`` out of the loss. While on the CPU."""
        self.loss_mask[start:end] = False
        self.supervised_index = index_of(self.loss_mask)

    def each(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch, all tensors that a model takes moved."""
        pixels = self.pixel_values
        return replace(
            self,
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            supervised_index=function(self.supervised_index),
            position_ids=function(self.position_ids),
            cu_seqlens=function(self.cu_seqlens),
            patches=self.patches.each(function),
            vision_index=function(self.vision_index),
            pixel_values=None if pixels is None else function(pixels),
        )


def index_of(mask: Tensor) -> Tensor:
    """The positions where a mask on the CPU is True, int64."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


class Unreadable(Enum):
    """What keeps a medium from being trained on, for good."""

    damaged = "its bytes are not those that were prepared"
    undecodable = "it does not decode to what was prepared"


@dataclass(frozen=True, slots=True)
class UnreadableSample:
    """A sample of a step whose media could not all be read; its pixels are zeros."""

    microbatch: int
    """Index in ``Step.microbatches``."""
    segment: int
    """Index in the microbatch's ``sample_ids``."""
    cause: Unreadable
    """Of its first medium that cannot be read, as are the next two."""
    shard: int
    offset: int
    """Bytes from the start of the shard."""
    reason: str
    """Of all of them."""


@dataclass(slots=True)
class MediaWork:
    """What it took to get the frames of some media."""

    num_decoded: int = 0
    num_kept: int = 0
    """Taken from a cache, none of their file read."""
    decode_us: int = 0
    """Microseconds of the threads that decoded; what they waited for a file not counted."""
    read_bytes: int = 0
    """Of files that were read to be decoded."""

    def __add__(self, other: "MediaWork") -> "MediaWork":
        return MediaWork(
            self.num_decoded + other.num_decoded,
            self.num_kept + other.num_kept,
            self.decode_us + other.decode_us,
            self.read_bytes + other.read_bytes,
        )


@dataclass(slots=True)
class Step:
    """All that one data-parallel rank trains on in one optimizer step."""

    microbatches: Sequence[Batch]
    packs: tuple[int, ...]
    """Numbers of this rank's packs, in the order of the microbatches."""
    unreadable: list[UnreadableSample]
    """Samples whose media this rank could not read; empty where it reads none."""
    num_sources: int
    """Of the plan; samples are of sources below it."""
    media_work: MediaWork = field(default_factory=MediaWork)
    """Of this rank."""
    imbalance: float = 1.0
    """Planned cost of the dearest data-parallel rank's share over the mean of all."""

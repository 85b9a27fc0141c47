"""What travels from the dataset folder to the loader: media, samples, packs. Imports no torch."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from triptych.configs.model_schema import VisionConfig
from triptych.configs.schema import DataConfig, VideoConfig


class MediaKind(IntEnum):
    """What a media item is, as stored in ``media.idx``."""

    IMAGE = 0
    VIDEO = 1


class Clip(NamedTuple):
    """A part of a video, in milliseconds from its first frame."""

    start_ms: int
    end_ms: int | None
    """Where the next clip may begin; None for the end of the video."""


@dataclass(frozen=True, slots=True)
class Media:
    """One media item.

    Where its bytes lie, and everything that decides how many tokens it becomes.
    """

    kind: MediaKind
    shard: int
    """Number of the tar file."""
    offset: int
    """Bytes from the start of the shard to the file's content."""
    size: int
    """Bytes."""
    xxh3: bytes
    """xxh3-128 of the content, 16 bytes."""
    width: int
    height: int
    frames: int = 1
    """Of a clip, those that begin in it."""
    duration_ms: int = 0
    start_ms: int = 0
    """Where in its file a clip begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLimits:
    """How much of a video is looked at: ``data.video`` of the configuration says what each is."""

    fps: float
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """Resolution limits; a training-time setting, never baked into a dataset."""

    min_pixels: int
    """Of an image."""
    max_pixels: int
    video: VideoLimits = VideoLimits(**asdict(VideoConfig()))

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """Those of a run."""
        return cls(data.min_pixels, data.max_pixels, VideoLimits(**asdict(data.video)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SizesSummary:
    """What would otherwise take a pass over all counts."""

    least_tokens: int
    most_tokens: int
    most_patches: int
    xxh3_128: list[str]
    """Hashes of the three columns of ``Sizes``, as little-endian int64, in hex."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What every sample of a dataset counts, under one geometry of patches and its limits."""

    num_tokens: NDArray[np.int64]
    """(num_samples,) LLM tokens, placeholders repeated."""
    num_patches: NDArray[np.int64]
    """(num_samples,) ViT patches."""
    num_patch_pairs: NDArray[np.int64]
    """(num_samples,) sum over frames of squared patch counts: what ViT attention costs."""
    summary: SizesSummary
    file: Path | None = None
    """Where the counts are mapped from; None where they are in memory."""
    check: Callable[[], None] = lambda: None
    """Asked before counts are touched; raises DataError where their file was cut under its map."""

    def __len__(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as stored: text with one placeholder token per media item."""

    input_ids: NDArray[np.int32]
    """(num_tokens,) with one placeholder per media item, not yet repeated."""
    targets: NDArray[np.uint8]
    """(num_tokens,) 1 where the token itself is a target (not shifted)."""
    media: tuple[Media, ...]
    """In order of appearance."""


class SampleId(NamedTuple):
    """Which sample: number of the source in the plan, index in its dataset."""

    source: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls


@dataclass(frozen=True, slots=True)
class Pack:
    """The samples of one sequence."""

    number: int
    """Counted from the start of the stage."""
    samples: tuple[SampleId, ...]
    num_tokens: int
    """LLM tokens, padding not counted."""
    num_patches: int


class Source(Protocol):
    """What plan and loader need of a dataset folder (``data.dataset.Dataset``)."""

    name: str

    def __len__(self) -> int:
        """Number of samples."""

    def sizes(self, limits: PixelLimits, vision: VisionConfig) -> Sizes:
        """What its samples count under these limits, cut into the patches of this tower."""

    def sample(self, index: int) -> Sample:
        """Text and media references of one sample; reads no pixels."""

    def read_media(self, media: Media) -> bytes:
        """The encoded file. Raises DataError if its hash is not the recorded one."""

    def read_span(self, media: Media, size: int) -> bytes:
        """``size`` bytes of its shard from where a file begins, not compared with any hash."""

"""What the plan knows of each dataset, and the checks that a mixture of them can be planned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from triptych.configs.model_schema import VisionConfig
from triptych.configs.schema import Oversize
from triptych.data.types import PixelLimits, Sizes, Source
from triptych.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class PlanSource:
    """The metadata of one dataset, and its weight in the mixture."""

    name: str
    weight: float
    """Share of samples or tokens, relative to the other sources."""
    sizes: Sizes
    max_epochs: float | None = None
    """How often its samples may come; None for without end."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def limit(self) -> int | None:
        """Samples, those that fit no pack included, after which it ends."""
        if self.max_epochs is None:
            return None
        return int(Fraction(str(self.max_epochs)) * len(self))

    def fits(
        self, indices: NDArray[np.int64] | slice, *, seq_len: int, max_patches: int
    ) -> NDArray[np.bool_]:
        """Which of some samples are within both budgets of a pack."""
        fits: NDArray[np.bool_] = self.sizes.num_tokens[indices] <= seq_len
        return fits & (self.sizes.num_patches[indices] <= max_patches)


def plan_sources(
    sources: Sequence[Source],
    weights: Mapping[str, float],
    limits: PixelLimits,
    vision: VisionConfig,
    max_epochs: Mapping[str, float | None] | None = None,
) -> list[PlanSource]:
    """The metadata of some datasets under a mixture, numbered as ``sources`` is.

    ``max_epochs``, by source, is for those that end.

    Raises:
        ConfigError: a weight is of no source, or a source has no weight.
    """
    names = [source.name for source in sources]
    problems = [
        f"weight of unknown source {name!r}; there are {', '.join(names) or 'none'}"
        for name in weights
        if name not in names
    ]
    problems += [
        f"source {name!r} has no weight  -> give it one, or leave it out of the mixture"
        for name in names
        if name not in weights
    ]
    _raise_all(problems)
    return [
        PlanSource(
            name=source.name,
            weight=weights[source.name],
            sizes=source.sizes(limits, vision),
            max_epochs=(max_epochs or {}).get(source.name),
        )
        for source in sources
    ]


def check_weights(sources: Sequence[PlanSource]) -> None:
    """Refuse what is no mixture.

    Raises:
        ConfigError: no source, one name twice, or a weight that is not positive.
    """
    names = [source.name for source in sources]
    problems = [] if sources else ["there is no source"]
    problems += [f"source {name!r} twice" for name in sorted(set(names)) if names.count(name) > 1]
    problems += [
        f"weight {source.weight} of source {source.name!r} must be a positive number"
        "  -> or leave the source out of the mixture"
        for source in sources
        if not (math.isfinite(source.weight) and source.weight > 0)
    ]
    _raise_all(problems)


def check_samples(sources: Sequence[PlanSource]) -> None:
    """Refuse sources that have nothing to draw.

    Raises:
        DataError: a source is empty, or ends before its first sample; a sample has no tokens.
    """
    for source in sources:
        if not len(source):
            raise DataError(f"source {source.name!r} is empty: there is no sample to draw")
        if source.limit == 0:
            raise DataError(
                f"source {source.name!r}: max_epochs={source.max_epochs} of {len(source)} samples "
                f"is none  -> at least {1 / len(source):.2g}, or leave it out of the mixture"
            )
        if source.sizes.summary.least_tokens < 1:
            index = int(source.sizes.num_tokens.argmin())
            raise DataError(f"source {source.name!r}, sample {index}: it has no tokens")


def fitting_share(
    source: PlanSource,
    num_fitting: int,
    misfit: int | None,
    *,
    seq_len: int,
    max_patches: int,
    oversize: Oversize,
) -> float:
    """The share of a source's samples that fit into a pack.

    Args:
        source: which one.
        num_fitting: samples of it that fit.
        misfit: the first that does not.
        seq_len: tokens in a pack, at most.
        max_patches: ViT patches in a pack, at most.
        oversize: what becomes of samples that do not fit.

    Raises:
        DataError: none fits, or one does not fit and ``oversize`` is error.
    """
    if misfit is not None and (not num_fitting or oversize is Oversize.error):
        sizes = source.sizes
        found = (
            f"source {source.name!r}, sample {misfit}: {sizes.num_tokens[misfit]} tokens and "
            f"{sizes.num_patches[misfit]} patches, but a pack takes train.seq_len={seq_len} "
            f"and data.max_patches={max_patches}"
        )
        remedy = "raise them, or lower data.max_pixels, for videos data.video.max_tokens"
        if not num_fitting:
            raise DataError(f"no sample fits into a pack, as {found}  -> {remedy}")
        raise DataError(f"{found}  -> {remedy}, or data.oversize=skip")
    return num_fitting / len(source)


def expected_tokens(source: PlanSource, num_tokens: int) -> int:
    """Of all that a source gives; exact where its epochs are whole.

    Args:
        source: one that ends.
        num_tokens: of its samples that fit into a pack.
    """
    assert source.limit is not None
    return num_tokens * source.limit // len(source)


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError("\n  ".join([f"{len(problems)} problems in the mixture", *problems]))

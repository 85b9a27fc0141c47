"""How many decoder layers each pipeline stage holds."""

from collections.abc import Sequence

from triptych.configs.schema import LanguageConfig, ModelConfig, ParallelConfig
from triptych.costs.flops import (
    PartFlops,
    Workload,
    adapter_flops,
    head_flops,
    layer_flops,
    vit_flops,
)

EXPECTED_VISION_SHARE = 0.5
"""Share of the tokens that come from the ViT, for the automatic split.

Ours, typical of stages 1 and 2.
"""
EXPECTED_PATCHES_PER_FRAME = 1024
"""A 448x448 image."""


def layers_per_stage(
    model: ModelConfig, parallel: ParallelConfig, *, seq_len: int
) -> tuple[int, ...]:
    """Decoder layers of each stage, as given in ``parallel.layout`` or balanced by cost for "auto".

    The first stage also runs the ViT and the merger, the last one the head; the layers between are
    split evenly, those that remain go to the stages before the last.
    """
    if parallel.layout != "auto":
        return tuple(parallel.layout)
    if parallel.pp == 1:
        return (model.language.num_layers,)
    load = _expected_load(model, seq_len)
    first = _training(vit_flops(model.vision, load)) + _training(adapter_flops(model, load))
    last = _training(head_flops(model.language, load))
    layer = _training(layer_flops(model.language, load))
    splits = _splits(model.language, parallel.pp)
    return min(splits, key=lambda counts: _slowest(counts, first, last, layer))


def _expected_load(model: ModelConfig, seq_len: int) -> Workload:
    patches = int(seq_len * EXPECTED_VISION_SHARE) * model.vision.spatial_merge_size**2
    return Workload(
        num_tokens=seq_len,
        token_pairs=seq_len**2 // 4,
        num_patches=patches,
        patch_pairs=patches * EXPECTED_PATCHES_PER_FRAME,
    )


def _training(part: PartFlops) -> float:
    return part.training(trains=True, gradient=True)


def _splits(language: LanguageConfig, pp: int) -> list[tuple[int, ...]]:
    """Every number of layers for first and last stage, the rest split evenly."""
    total = language.num_layers
    if pp == 2:
        return [(first, total - first) for first in range(1, total)]
    return [
        (first, *_even(total - first - last, pp - 2), last)
        for first in range(1, total)
        for last in range(1, total)
        if total - first - last >= pp - 2
    ]


def _even(layers: int, stages: int) -> list[int]:
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def _slowest(
    counts: Sequence[int], first: float, last: float, layer: float
) -> tuple[float, list[float]]:
    """Cost of the slowest stage, then of all from slowest to fastest.

    A tie goes to the evener split.
    """
    costs = [layer * count for count in counts]
    costs[0] += first
    costs[-1] += last
    return max(costs), sorted(costs, reverse=True)

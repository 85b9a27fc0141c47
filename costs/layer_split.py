"""How many decoder layers each pipeline stage holds, and how long stages wait for each other."""

from dataclasses import dataclass

import numpy as np

from triptych.configs.schema import Config
from triptych.costs.communication import part_duration
from triptych.costs.compute import PartCompute, expected_load
from triptych.costs.pipeline_schedule import Timeline, ideal_bubble, simulate


def layers_per_chunk(config: Config) -> tuple[int, ...]:
    """Decoder layers of each model chunk, as given in ``parallel.layout`` or balanced for "auto".

    The first chunk also holds the ViT and the merger, the last one the head.

    Returns:
        pp * vpp counts: of each stage's first chunk, then of each stage's second, and so on.
    """
    if config.parallel.layout != "auto":
        return tuple(config.parallel.layout)
    return _balanced(
        part_duration(config, expected_load(config)),
        num_layers=config.model.language.num_layers,
        pp=config.parallel.pp,
        vpp=config.parallel.vpp,
    )


@dataclass(frozen=True, slots=True)
class PlannedBubble:
    """Shares of all stages' time in which they wait, messages not counted."""

    planned: float
    """The share for full packs with the expected share of vision."""
    ideal: float
    """If every chunk cost the same."""

    def __str__(self) -> str:
        return f"planned bubble {self.planned:.1%} (ideal {self.ideal:.1%})"


def planned_bubble(config: Config, *, num_microbatches: int) -> PlannedBubble:
    """What the split of the layers costs."""
    pp, vpp = config.parallel.pp, config.parallel.vpp
    return PlannedBubble(
        planned=planned_timeline(config, num_microbatches=num_microbatches).bubble,
        ideal=ideal_bubble(pp=pp, num_microbatches=num_microbatches, vpp=vpp),
    )


def planned_timeline(config: Config, *, num_microbatches: int) -> Timeline:
    """One step with full packs; its seconds are FLOPs at peak rate (costs/compute.py)."""
    parts = part_duration(config, expected_load(config))
    chunks = parts.of_chunks(layers_per_chunk(config))
    shape = (config.parallel.vpp, config.parallel.pp)
    return simulate(
        np.reshape([chunk.forward for chunk in chunks], shape),
        np.reshape([chunk.backward for chunk in chunks], shape),
        num_microbatches=num_microbatches,
    )


def _balanced(parts: PartCompute, *, num_layers: int, pp: int, vpp: int) -> tuple[int, ...]:
    """The split whose slowest stage is fastest.

    Every chunk gets one layer, then each further layer goes to the stage with least to do, and
    there to the chunk with least to do; the earlier one where they are equal. Layers all cost the
    same, so nothing beats this.
    """
    layers = [1] * (pp * vpp)
    costs = [chunk.total for chunk in parts.of_chunks(layers)]
    layer = parts.layer.total
    for _ in range(num_layers - pp * vpp):
        stage = min(range(pp), key=lambda stage: round(sum(costs[stage::pp]) / layer, 6))
        chunk = min(range(stage, pp * vpp, pp), key=lambda chunk: round(costs[chunk] / layer, 6))
        layers[chunk] += 1
        costs[chunk] += layer
    return tuple(layers)

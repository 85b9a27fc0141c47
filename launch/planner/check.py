"""A plan against real ranks: one of each kind of pipeline stage, built without its memory."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from triptych.configs.schema import PARTS
from triptych.costs.activation_memory import CPU, Activations
from triptych.costs.estimate import Estimate
from triptych.costs.parameter_shards import chunk_shards
from triptych.launch.planner.estimate_tables import GIB, table

TOLERANCE = 0.05
"""Largest difference of the bytes kept for the backward pass; parameters must be equal."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model chunk of one rank."""

    stage: int
    chunk: int
    planned_parameters: tuple[int, ...]
    """Parameters by part."""
    counted_parameters: tuple[int, ...]
    planned_bytes: int
    counted_bytes: int

    @property
    def difference(self) -> float:
        """Planned bytes over those counted, minus 1."""
        return self.planned_bytes / self.counted_bytes - 1

    @property
    def agrees(self) -> bool:
        """Parameters exactly, bytes within the tolerance."""
        same = self.planned_parameters == self.counted_parameters
        return same and abs(self.difference) <= TOLERANCE


def check(estimate: Estimate) -> str:
    """The comparison as a table. Exits with 1 where plan and rank disagree."""
    found = list(compare(estimate))
    rows = [["stage", "chunk", "parameters", "counted", "GiB kept", "counted", "difference"]]
    rows += [
        [
            str(one.stage),
            str(one.chunk),
            f"{sum(one.planned_parameters):,}",
            f"{sum(one.counted_parameters):,}",
            f"{one.planned_bytes / GIB:.3f}",
            f"{one.counted_bytes / GIB:.3f}",
            f"{one.difference:+.2%}",
        ]
        for one in found
    ]
    text = (
        "Against one real rank of each kind of stage, with the kernels of a CPU; kept of one "
        f"microbatch\n{table(rows)}"
    )
    if not all(one.agrees for one in found):
        sys.stdout.write(f"{text}\n")
        sys.exit("plan and rank disagree: a formula of costs/ is not what models/ does")
    return text


def compare(estimate: Estimate) -> Iterator[Comparison]:
    """Plan and count for the first stage, one in between, and the last."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # shapes are counted, nothing is computed
    from triptych.models.fake_rank import count_rank

    config, pp = estimate.config, estimate.config.parallel.pp
    assert config.cluster.gpus is not None
    shards = chunk_shards(config, estimate.layers)
    saved = Activations(config, estimate.shape.load, CPU).of_chunks(estimate.layers)
    for stage in sorted({0, pp // 2, pp - 1}):
        rank = stage * config.cluster.gpus // pp
        counted = count_rank(
            config, estimate.layers, estimate.shape.load, rank=rank, world_size=config.cluster.gpus
        )
        for chunk, found in enumerate(counted):
            index = chunk * pp + stage
            yield Comparison(
                stage,
                chunk,
                planned_parameters=tuple(shards[index][part].total for part in PARTS),
                counted_parameters=tuple(found.parameters.values()),
                planned_bytes=saved[index].total,
                counted_bytes=found.saved_bytes,
            )

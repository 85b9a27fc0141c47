"""The bubble of the real schedule, over gloo with stages that sleep, against theory and planner.

    python benchmarks/bubble.py        # two minutes, next to no CPU time

A pass sleeps 50 ms and more forward, twice as long backward: sleeping takes no core, so the number
of cores does not matter. Of five steps the one that waited least counts, as whatever else the
machine does can only add; the spread is printed.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triptych.benchmarks.table import Row, print_rows
from triptych.costs.pipeline_schedule import ideal_bubble, simulate
from triptych.tests.helpers.pool import RankPool
from triptych.tests.helpers.sleeping import measured_bubble, run_sleeping

COMMAND = "python benchmarks/bubble.py"
NUM_MICROBATCHES, NUM_ROUNDS = 8, 5
POINTS = 2.0


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Seconds of a forward pass, by chunk and stage."""

    name: str
    forward_s: list[list[float]]

    @property
    def is_even(self) -> bool:
        """Whether theory has a formula."""
        return len({seconds for chunk in self.forward_s for seconds in chunk}) == 1


PIPELINES = [
    Pipeline("2 even stages", [[0.05] * 2]),
    Pipeline("4 even stages", [[0.05] * 4]),
    Pipeline("2 even stages of 2 chunks", [[0.05] * 2] * 2),
    Pipeline("4 even stages of 2 chunks", [[0.05] * 4] * 2),
    Pipeline("2 uneven stages", [[0.08, 0.05]]),
    Pipeline("4 uneven stages", [[0.1, 0.05, 0.05, 0.07]]),
]


def main() -> list[Row]:
    """Print everything; returns a row for each pipeline."""
    print("| pipeline, m 8 | measured | of all steps | planned | (p-1)/(vm+p-1) |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pools = {size: RankPool(size, Path(folder) / str(size)) for size in (2, 4)}
        try:
            return [_measure(pipeline, pools[len(pipeline.forward_s[0])]) for pipeline in PIPELINES]
        finally:
            for pool in pools.values():
                pool.stop()


def _measure(pipeline: Pipeline, pool: RankPool) -> Row:
    forward_s = pipeline.forward_s
    backward_s = (2 * np.asarray(forward_s)).tolist()
    ranks = pool.run(
        run_sleeping,
        forward_s=forward_s,
        backward_s=backward_s,
        num_microbatches=NUM_MICROBATCHES,
        num_rounds=NUM_ROUNDS,
    )
    bubbles = [measured_bubble(stages) for stages in zip(*ranks, strict=True)]
    planned = simulate(forward_s, backward_s, num_microbatches=NUM_MICROBATCHES).bubble
    ideal = ideal_bubble(pp=pool.world_size, num_microbatches=NUM_MICROBATCHES, vpp=len(forward_s))
    found = min(bubbles)
    print(
        f"| {pipeline.name} | {found:.1%} | {min(bubbles):.1%} to {max(bubbles):.1%} "
        f"| {planned:.1%} | {ideal:.1%} |"
    )
    wanted, source = (ideal, "theory") if pipeline.is_even else (planned, "planner")
    off = 100 * (found - wanted)
    claim = f"bubble of the real schedule, {pipeline.name}, against {source}'s {wanted:.1%}"
    figure, bar = f"{found:.1%}, {off:+.1f} points", f"within {POINTS:g} points"
    return Row(claim, figure, bar, abs(off) <= POINTS, COMMAND)


if __name__ == "__main__":
    print_rows(main())

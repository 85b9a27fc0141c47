"""Speed of planning, fill of packs, balance of ranks and stages, on a synthetic mixture.

    python benchmarks/packing.py        # about a minute

The mixture stands in benchmarks/broad_mixture.py; ranks and stages cost what costs/compute.py says.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triptych.benchmarks.broad_mixture import MAX_PATCHES, SEQ_LEN, VISION_SHARE, make_plan
from triptych.benchmarks.table import Row, print_rows
from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.costs.compute import compute_of_pack, part_compute
from triptych.costs.layer_split import layers_per_chunk
from triptych.costs.pipeline_schedule import simulate
from triptych.data.plan.balance import assign

COMMAND = "python benchmarks/packing.py"
LEAST_FILL, LEAST_SPEED = 0.99, 1e5
NUM_PACKS, NUM_STEPS, NUM_SIMULATED = 8000, 50, 5


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """Which model on how many ranks, and the most that its dearest rank may be above the mean."""

    model: str
    tp: int
    pp: int
    dp: int
    num_microbatches: int
    bar: float

    def config(self) -> Config:
        """Everything trains; stage 2."""
        degrees = [f"parallel.tp={self.tp}", f"parallel.pp={self.pp}"]
        expected = [f"train.seq_len={SEQ_LEN}", f"data.vision_share={VISION_SHARE}"]
        return load_config([f"model=qwen2_vl_{self.model}", "stage=2", *degrees, *expected])

    def __str__(self) -> str:
        return f"{self.model}, dp {self.dp}, m {self.num_microbatches}"


LAYOUTS = [
    DeviceLayout("2b", tp=1, pp=2, dp=64, num_microbatches=8, bar=1.02),
    DeviceLayout("7b", tp=4, pp=2, dp=32, num_microbatches=16, bar=1.01),
    DeviceLayout("72b", tp=8, pp=8, dp=16, num_microbatches=64, bar=1.01),
]


def main() -> list[Row]:
    """Print everything; returns a row for each claim."""
    print("| max_patches | planning | fill: tokens | fill: patches | tokens bind | patches bind |")
    print("|---|---|---|---|---|---|")
    fill = {bound: measure_fill(bound) for bound in (32768, 22528, MAX_PATCHES, 20480, 16384)}
    rows = [
        Row(
            f"fill of {SEQ_LEN}-token packs, max_patches={MAX_PATCHES}",
            f"{fill[MAX_PATCHES]:.4f}",
            f">= {LEAST_FILL}",
            fill[MAX_PATCHES] >= LEAST_FILL,
            COMMAND,
        )
    ]
    print("\n| layout | as they come | balanced | worst step | planning and balance |")
    print("|---|---|---|---|---|")
    for layout in LAYOUTS:
        rows += measure_balance(layout)
    print("\n| layout | layers | as they come | balanced, any order | dear to cheap | all alike |")
    print("|---|---|---|---|---|---|")
    for layout in LAYOUTS:
        measure_stages(layout)
    return rows


def measure_fill(max_patches: int) -> float:
    """Print speed and fill; returns the share of the packs' positions that hold tokens.

    A budget binds where less than 1 % of it is left.
    """
    plan = make_plan(max_patches)
    begin = time.process_time()
    packs = plan.first_packs(NUM_PACKS)
    seconds = time.process_time() - begin
    speed = sum(len(pack.samples) for pack in packs) / seconds
    tokens = np.array([pack.num_tokens for pack in packs]) / SEQ_LEN
    patches = np.array([pack.num_patches for pack in packs]) / max_patches
    print(
        f"| {max_patches} | {speed:,.0f} samples / CPU-s | {tokens.mean():.4f} "
        f"| {patches.mean():.4f} | {(tokens > 0.99).mean():.0%} | {(patches > 0.99).mean():.0%} |"
    )
    return float(tokens.mean())


def measure_balance(layout: DeviceLayout) -> list[Row]:
    """Print the cost of the dearest rank over the mean; returns rows for balance and speed."""
    cost, plan, dp = compute_of_pack(layout.config()), make_plan(), layout.dp
    cursor = plan.start
    as_they_come, balanced, num_samples, seconds = [], [], 0, 0.0
    for _ in range(NUM_STEPS):
        begin = time.process_time()
        packs, cursor = plan.next_packs(cursor, dp * layout.num_microbatches)
        costs = [cost(plan.workload(pack)) for pack in packs]
        ranks = assign(costs, dp_size=dp, micro_batch_size=1)
        seconds += time.process_time() - begin
        num_samples += sum(len(pack.samples) for pack in packs)
        mean = sum(costs) / dp
        as_they_come.append(max(sum(costs[rank::dp]) for rank in range(dp)) / mean)
        by_rank = [sum(costs[i] for group in rank for i in group) for rank in ranks]
        balanced.append(max(by_rank) / mean)
    found, speed = float(np.mean(balanced)), num_samples / seconds
    print(
        f"| {layout} | {np.mean(as_they_come):.3f} | {found:.4f} | {max(balanced):.4f} "
        f"| {speed:,.0f} samples / CPU-s |"
    )
    claim = f"dearest rank / mean, {NUM_STEPS} steps, {layout}"
    quick = f"{LEAST_SPEED:,.0f}"
    return [
        Row(claim, f"{found:.4f}", f"<= {layout.bar}", found <= layout.bar, COMMAND),
        Row(
            f"whole plan with balance, samples / CPU-s, {layout}",
            f"{speed:,.0f}",
            f">= {quick}",
            speed >= LEAST_SPEED,
            COMMAND,
        ),
    ]


def measure_stages(layout: DeviceLayout) -> None:
    """Print the simulated makespan of the slowest replica, over that of even stages and packs."""
    config, plan = layout.config(), make_plan()
    cost, layers = compute_of_pack(config), layers_per_chunk(config)
    cursor, rng = plan.start, np.random.default_rng(0)
    found: list[tuple[float, ...]] = []
    for _ in range(NUM_SIMULATED):
        packs, cursor = plan.next_packs(cursor, layout.dp * layout.num_microbatches)
        loads = [plan.workload(pack) for pack in packs]
        chunks = [part_compute(config, load).of_chunks(layers) for load in loads]
        seconds = np.array([[(work.forward, work.backward) for work in pack] for pack in chunks])
        ranks = assign([cost(load) for load in loads], dp_size=layout.dp, micro_batch_size=1)
        ordered = np.array(ranks)[:, :, 0]
        m, pp = layout.num_microbatches, layout.pp
        ideal = seconds.sum() / len(packs) / pp * (m + pp - 1)
        alike = np.broadcast_to(seconds.mean(axis=0), seconds.shape)
        orders = [
            np.arange(len(packs)).reshape(m, layout.dp).T,
            rng.permuted(ordered, axis=1),
            ordered,
        ]
        found.append(
            (
                *(slowest(seconds, order) / ideal for order in orders),
                slowest(alike, ordered[:1]) / ideal,
            )
        )
    figures = " | ".join(f"{figure:.3f}" for figure in np.mean(found, axis=0))
    print(f"| {layout}, pp {layout.pp} | {list(layers)} | {figures} |")


def slowest(seconds: NDArray[np.float64], ranks: NDArray[np.int64]) -> float:
    """Makespan of the slowest replica.

    Args:
        seconds: (num_packs, pp, 2) of the forward and the backward pass.
        ranks: (dp, num_microbatches) packs.
    """
    makespans = []
    for packs in ranks:
        forward, backward = seconds[packs].transpose(2, 1, 0)
        timeline = simulate(forward[None], backward[None], num_microbatches=len(packs))
        makespans.append(timeline.makespan_s)
    return max(makespans)


if __name__ == "__main__":
    print_rows(main())

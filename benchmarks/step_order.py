"""Which microbatch goes when: the simulated pipeline judges some orders of one replica's packs.

    python benchmarks/step_order.py        # about a minute

The mixture stands in benchmarks/broad_mixture.py; what passes cost says costs/compute.py. A figure
is the makespan of the slowest replica over that of its packs from dear to cheap (balance.py). The
last rows are the order that training takes (costs/microbatch_order.py), and what is left of it
where each pass takes 10 % more or less at random, or the first stage a third more, than planned.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from triptych.benchmarks.broad_mixture import make_plan
from triptych.benchmarks.packing import DeviceLayout, slowest
from triptych.costs.compute import compute_of_pack, part_compute
from triptych.costs.layer_split import layers_per_chunk
from triptych.costs.microbatch_order import pipeline_order
from triptych.data.plan.balance import assign

NUM_STEPS = 5
LAYOUTS = [
    DeviceLayout("7b", tp=2, pp=4, dp=8, num_microbatches=16, bar=1.01),
    DeviceLayout("7b", tp=2, pp=4, dp=8, num_microbatches=64, bar=1.01),
    DeviceLayout("72b", tp=8, pp=8, dp=4, num_microbatches=32, bar=1.01),
    DeviceLayout("72b", tp=8, pp=8, dp=4, num_microbatches=64, bar=1.01),
]

Order = Callable[[NDArray[np.float64]], NDArray[np.int64]]
"""From (num_microbatches, pp) seconds of both passes to the order of the microbatches."""


def alternating(key: NDArray[np.float64]) -> NDArray[np.int64]:
    """The dearest, the cheapest, the second dearest, and so on."""
    down = np.argsort(-key, kind="stable")
    half = (len(key) + 1) // 2
    order = np.empty_like(down)
    order[::2], order[1::2] = down[:half], down[half:][::-1]
    return order


def in_the_middle(key: NDArray[np.float64]) -> NDArray[np.int64]:
    """From cheap to dear, and back."""
    up = np.argsort(key, kind="stable")
    return np.concatenate([up[::2], up[1::2][::-1]])


def at_both_ends(key: NDArray[np.float64]) -> NDArray[np.int64]:
    """From dear to cheap, and back."""
    down = np.argsort(-key, kind="stable")
    return np.concatenate([down[::2], down[1::2][::-1]])


def johnson(s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Johnson's rule, of the first half of the stages and the second: short first passes first."""
    first, second = np.array_split(s, 2, axis=1)
    a, b = first.sum(axis=1), second.sum(axis=1)
    early = np.flatnonzero(a < b)
    late = np.flatnonzero(a >= b)
    return np.concatenate([early[np.argsort(a[early])], late[np.argsort(-b[late])]])


ORDERS: dict[str, Order] = {
    "all: dear to cheap": lambda s: np.arange(len(s)),
    "all: cheap to dear": lambda s: np.arange(len(s))[::-1],
    "ViT: dear to cheap": lambda s: np.argsort(-s[:, 0], kind="stable"),
    "ViT: cheap to dear": lambda s: np.argsort(s[:, 0], kind="stable"),
    "LLM: dear to cheap": lambda s: np.argsort(-s[:, -1], kind="stable"),
    "ViT: alternating": lambda s: alternating(s[:, 0]),
    "ViT: dearest in the middle": lambda s: in_the_middle(s[:, 0]),
    "ViT: dearest at both ends": lambda s: at_both_ends(s[:, 0]),
    "Johnson": johnson,
}


def main() -> None:
    """Print a table, then what choosing costs."""
    names = [*ORDERS, "simulated", "simulated, passes 10 % off", "simulated, stage 0 dearer"]
    print("| order | " + " | ".join(f"{each}, pp {each.pp}" for each in LAYOUTS) + " |")
    print("|---" * (len(LAYOUTS) + 1) + "|")
    found = [measure(layout) for layout in LAYOUTS]
    for name, *figures in zip([*names, "CPU-s to choose"], *found, strict=True):
        print(f"| {name} | " + " | ".join(f"{figure:.4f}" for figure in figures) + " |")


def measure(layout: DeviceLayout) -> list[float]:
    """The makespan of each order over that from dear to cheap, mean over steps; CPU-seconds."""
    config, plan = layout.config(), make_plan()
    cost, layers = compute_of_pack(config), layers_per_chunk(config)
    cursor, rng, choose = plan.start, np.random.default_rng(0), pipeline_order(config)
    figures, cpu_s = [], 0.0
    for _ in range(NUM_STEPS):
        packs, cursor = plan.next_packs(cursor, layout.dp * layout.num_microbatches)
        loads = [plan.workload(pack) for pack in packs]
        chunks = [part_compute(config, load).of_chunks(layers) for load in loads]
        seconds = np.array([[(work.forward, work.backward) for work in pack] for pack in chunks])
        assigned = assign([cost(load) for load in loads], dp_size=layout.dp, micro_batch_size=1)
        ranks = np.array(assigned)[:, :, 0]
        by_order = [
            slowest(seconds, np.array([rank[order(seconds[rank].sum(axis=2))] for rank in ranks]))
            for order in ORDERS.values()
        ]
        begin = time.process_time()
        chosen = np.array([rank[choose([loads[i] for i in rank])] for rank in ranks])
        cpu_s += (time.process_time() - begin) / len(ranks)
        dearer = seconds * np.where(np.arange(layout.pp) == 0, 4 / 3, 1)[:, None]
        off = seconds * rng.normal(1, 0.1, seconds.shape)
        figures.append(
            [
                *(makespan / by_order[0] for makespan in by_order),
                *(slowest(s, chosen) / slowest(s, ranks) for s in (seconds, off, dearer)),
            ]
        )
    return [*np.mean(figures, axis=0).tolist(), cpu_s / NUM_STEPS]


if __name__ == "__main__":
    main()

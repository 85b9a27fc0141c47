"""The plan of a 72B model on 1,024 devices against one real rank of each kind of stage.

python benchmarks/planner.py        # half a CPU-minute

The ranks are built under torch's fake process group, the ViT on the first stage included:
parameters are counted, and the bytes that autograd saves of one microbatch
(launch/planner/check.py).
"""

import io
from contextlib import redirect_stdout

from triptych.benchmarks.table import Row, print_rows
from triptych.configs.compose import load_config
from triptych.costs.estimate import estimate
from triptych.launch.planner.check import TOLERANCE, compare

COMMAND = "python benchmarks/planner.py"
RUN = "model=qwen2_vl_72b stage=2 train.global_batch_size=1024 cluster=h100 cluster.gpus=1024"
LAYOUTS = (
    "parallel=tp8_pp8",
    "parallel=tp8_pp4",
    "parallel=tp8_pp8 parallel.sequence_parallel=false",
)
RECOMPUTE = (
    "parallel.recompute.vit=none parallel.recompute.llm=none",
    "parallel.recompute.vit=full parallel.recompute.llm=full",
)


def main() -> list[Row]:
    """Print a line for each layout; returns one row for parameters, one for bytes."""
    print("| layout | ranks | parameters | bytes kept, worst |\n|---|---|---|---|")
    exact, worst = True, 0.0
    for words in (f"{layout} {recompute}" for layout in LAYOUTS for recompute in RECOMPUTE):
        with redirect_stdout(io.StringIO()):  # megatron-core's
            found = list(compare(estimate(load_config([*RUN.split(), *words.split()]))))
        same = all(one.planned_parameters == one.counted_parameters for one in found)
        apart = max(abs(one.difference) for one in found)
        print(f"| `{words}` | {len(found)} | {'exact' if same else 'DIFFER'} | {apart:.3%} |")
        exact, worst = exact and same, max(worst, apart)
    bar = f"within {TOLERANCE:.0%}"
    return [
        Row("planned parameters", "exact" if exact else "differ", "exact", exact, COMMAND),
        Row("planned saved bytes", f"{worst:.3%}", bar, worst <= TOLERANCE, COMMAND),
    ]


if __name__ == "__main__":
    print_rows(main())

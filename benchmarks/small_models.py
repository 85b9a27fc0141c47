"""CPU-seconds of a training step of the debug and the demo model, and the share of the GEMM rate.

    python benchmarks/small_models.py                    # this checkout
    python benchmarks/small_models.py ../before .        # checkouts with a .venv each, in turns

A run of a few steps and one of many more: the difference, over the steps between, is all that a
step costs on all ranks: reading, computing, messages, logging. Only commands are called, so any two
commits can be compared. They take turns in every round, and a matrix product goes before each.
"""

import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from triptych.benchmarks.speed import cpu_seconds, product
from triptych.benchmarks.table import spread

ROOT = Path(__file__).parents[1]
NUM_ROUNDS = 3
FEW, MANY = 4, 44
"""Steps of the two runs."""
CASES = {
    "debug, stage 2, one process": (1, "stage=2"),
    "demo, stage 2, one process": (1, "stage=2 model=demo train.micro_batch_size=4"),
    "demo, stage 1, pp2": (2, "stage=1 model=demo parallel=pp2 parallel.layout=[1,2]"),
    "demo, stage 1, dp2": (2, "stage=1 model=demo train.micro_batch_size=2"),
    "demo, stage 2, tp2": (2, "stage=2 model=demo parallel=tp2 train.micro_batch_size=4"),
    "demo, stage 2, dp2": (2, "stage=2 model=demo train.micro_batch_size=2"),
}
"""Name -> ranks, and words for launch/pretrain.py."""


def main() -> None:
    """Measure every case in every checkout; print Markdown."""
    checkouts = [Path(word).resolve() for word in sys.argv[1:]] or [ROOT]
    print(
        "| case | checkout | CPU-s / step | share of the GEMM rate | times as fast as the first |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        first = f"train.num_steps=1 run.dir={folder}/first data.root={folder}/data"
        run_seconds(checkouts[0], 1, first)  # makes the data
        for number, (case, (num_ranks, words)) in enumerate(CASES.items()):
            rounds = []
            for turn in range(NUM_ROUNDS):
                taken = {}
                for checkout in checkouts:
                    run_dir = Path(folder) / f"{number}_{turn}_{checkouts.index(checkout)}"
                    taken[checkout] = step_of(
                        checkout, num_ranks, f"{words} data.root={folder}/data", run_dir
                    )
                rounds.append(taken)
            for checkout in checkouts:
                seconds = [taken[checkout][0] for taken in rounds]
                shares = [taken[checkout][1] for taken in rounds]
                ratios = [taken[checkouts[0]][0] / taken[checkout][0] for taken in rounds]
                print(
                    f"| {case} | {checkout.name} | {spread(seconds, 3)} | {spread(shares)} "
                    f"| {spread(ratios)} |",
                    flush=True,
                )


def step_of(checkout: Path, num_ranks: int, words: str, run_dir: Path) -> tuple[float, float]:
    """CPU-seconds of a step over all ranks, and its model FLOPs over those of matrix products."""
    flops, multiply = product()
    rate = flops / cpu_seconds(multiply)
    few, many = (
        run_seconds(
            checkout, num_ranks, f"{words} train.num_steps={steps} run.dir={run_dir}_{steps}"
        )
        for steps in (FEW, MANY)
    )
    lines = Path(f"{run_dir}_{MANY}/metrics.jsonl").read_text().splitlines()[FEW:]
    seconds = (many - few) / (MANY - FEW)
    return seconds, statistics.mean(json.loads(line)["flops"] for line in lines) / seconds / rate


def run_seconds(checkout: Path, num_ranks: int, words: str) -> float:
    """CPU-seconds of a run and all its processes; ends with the run where that fails."""
    program = f"{checkout}/.venv/bin/torchrun --standalone --nproc-per-node {num_ranks}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        shlex.split(f"{program} launch/pretrain.py {words} run.checkpoint_every=1000"),
        cwd=checkout,
        env={"PATH": f"{checkout}/.venv/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{words}\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()

"""What a plan costs that is large: to open, to go on from any place, to plan with, to keep.

    python benchmarks/plan_scale.py 100000000        # samples; 2.4 GB of disk for 10^8

Five sources of random lengths, their counts in files as a dataset has them. All is measured in
processes of their own, the first of which makes the pass over every count.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from triptych.benchmarks.opening import memory_mb
from triptych.benchmarks.table import Row, print_rows
from triptych.configs.schema import Oversize, WeighBy
from triptych.data.dataset.sizes import Columns, open_sizes
from triptych.data.plan.order import Cursor, Plan
from triptych.data.plan.passes import remember_in
from triptych.data.plan.plan_sources import PlanSource

COMMAND = "python benchmarks/plan_scale.py 100000000"
WEIGHTS = {"captions": 0.5, "ocr": 0.15, "interleaved": 0.15, "vqa": 0.1, "text": 0.1}
WINDOW, NUM_WINDOWS, NUM_SEEKS = 4096, 25, 9
MODES = {"samples": None, "tokens": None, "tokens, 2.5 epochs": 2.5}


def main() -> list[Row]:
    """Make the counts, plan in fresh processes; returns a row for each claim."""
    num_samples = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        sources(Path(folder), num_samples, None)
        found = {}
        for mode in MODES:
            for opened in ("first", "again"):
                command = [sys.executable, __file__, "measure", folder, str(num_samples), mode]
                found[mode, opened] = json.loads(subprocess.check_output(command))
                print(mode, opened, found[mode, opened], flush=True)
    bars = {"open_s": 2.0, "seek_ms": 100.0, "state_bytes": 1000.0, "own_mb": 200.0}
    return [
        Row(
            f"plan of {num_samples:,} samples by {mode}: {name}",
            f"{figures[name]:,.3g}",
            f"< {bar:g}" if name in bars else f">= {bar:g}",
            figures[name] < bar if name in bars else figures[name] >= bar,
            COMMAND,
        )
        for (mode, opened), figures in found.items()
        for name, bar in {**bars, "samples_per_cpu_s": 1e5}.items()
        if opened == "again"
    ]


def sources(folder: Path, num_samples: int, max_epochs: float | None) -> list[PlanSource]:
    """The mixture, a fifth of the samples in each source; counted where no file has them."""

    def count(start: int, end: int) -> Columns:
        rng = np.random.default_rng(start)
        patches = 4 * rng.integers(0, 1024, end - start)
        text = rng.lognormal(5.0, 0.8, end - start).astype(np.int64)
        return patches // 4 + np.clip(text, 8, 6000), patches, patches**2

    return [
        PlanSource(
            name,
            weight,
            open_sizes(count, num_samples // len(WEIGHTS), {"source": name}, [folder / name]),
            max_epochs,
        )
        for name, weight in WEIGHTS.items()
    ]


def measure(folder: Path, num_samples: int, mode: str) -> None:
    """Open, seek and plan in this process, and print what it took as JSON."""
    before = memory_mb("RssAnon")
    begin = time.process_time()
    plan = Plan(
        sources(folder, num_samples, MODES[mode]),
        seed=0,
        seq_len=8192,
        max_patches=21504,
        window=WINDOW,
        oversize=Oversize.skip,
        weigh_by=WeighBy[mode.partition(",")[0]],
        remember=remember_in([folder / "plans"]),
    )
    opened = time.process_time()
    seeks, cursor = [], plan.start
    for number in range(NUM_SEEKS):
        place = number * num_samples // NUM_SEEKS // WINDOW * WINDOW
        drawn = tuple(round(weight * place) for weight in WEIGHTS.values())
        counted = tuple(1000 * count for count in drawn) if mode != "samples" else ()
        cursor = Cursor(drawn, (0,) * len(drawn), place // WINDOW, counted=counted)
        start = time.process_time()
        _, cursor = plan.next_packs(cursor, 1)
        seeks.append(time.process_time() - start)
    begun = time.process_time()
    num_planned = 0
    last = cursor.window + NUM_WINDOWS
    while cursor.window < last:
        packs, cursor = plan.next_packs(cursor, 64)
        num_planned += sum(len(pack.samples) for pack in packs)
    figures = {
        "open_s": opened - begin,
        "seek_ms": 1e3 * max(seeks),
        "samples_per_cpu_s": num_planned / (time.process_time() - begun),
        "state_bytes": len(json.dumps(cursor.to_json())),
        "own_mb": memory_mb("RssAnon") - before,
        "own_mb_with_imports": memory_mb("RssAnon"),
        "mapped_mb": memory_mb("RssFile"),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        measure(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        print_rows(main())

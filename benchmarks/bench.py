"""Every claim, measured one after the other, and a table of all at the end: ``make bench``.

python benchmarks/bench.py            # all
python benchmarks/bench.py packing    # some of CLAIMS
"""

import importlib
import multiprocessing
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from triptych.benchmarks.table import Row, print_rows

CLAIMS = ("startup", "packing", "planner", "messages", "bubble", "speed", "gpu")
"""Scripts of this folder whose ``main`` prints what it finds, as Markdown, and returns rows."""


def main(names: Sequence[str]) -> None:
    """Run them, each in a process of its own: some hide the GPU, one needs it."""
    unknown = set(names) - set(CLAIMS)
    if unknown:
        sys.exit(f"there is no benchmark {', '.join(unknown)}  -> {', '.join(CLAIMS)}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", flush=True)
    rows: list[Row] = []
    for name in names or CLAIMS:
        print(f"\n## {name}\n", flush=True)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows += process.submit(measure, name).result()
    print("\n## all claims")
    print_rows(rows)


def measure(name: str) -> list[Row]:
    """Run one."""
    rows: list[Row] = importlib.import_module(f"triptych.benchmarks.{name}").main()
    sys.stdout.flush()
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])

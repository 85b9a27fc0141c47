"""What it takes to be told something: CPU-seconds of commands that compute nothing, and no torch.

    python benchmarks/startup.py

The median of five starts each; CPU-seconds of the process and its children.
"""

import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from triptych.benchmarks.table import Row, print_rows

ROOT = Path(__file__).parents[1]
COMMAND = "python benchmarks/startup.py"
NUM_STARTS = 5
HEAVY = ("torch", "megatron", "transformers", "deepspeed")


@dataclass(frozen=True, slots=True)
class Start:
    """A command line, and the most CPU-seconds that it may take."""

    words: tuple[str, ...]
    most_s: float

    def __str__(self) -> str:
        return " ".join(self.words)


STARTS = [
    Start(("launch/pretrain.py", "--help"), 3.0),
    Start(
        (
            "launch/plan.py",
            "stage=2",
            "model=qwen2_vl_72b",
            "parallel=tp8_pp8",
            "cluster=h100",
            "cluster.gpus=1024",
        ),
        3.0,
    ),
]


def main() -> list[Row]:
    """Print everything; returns rows for the CPU-seconds and the imports of each command."""
    print("| command | CPU-seconds, median | of all | imports |\n|---|---|---|---|")
    rows = []
    for start in STARTS:
        seconds = [cpu_seconds(start) for _ in range(NUM_STARTS)]
        median, heavy = statistics.median(seconds), heavy_imports(start)
        told = ", ".join(heavy) or "no torch"
        print(f"| `{start}` | {median:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | {told} |")
        met = median <= start.most_s
        rows.append(
            Row(f"CPU-seconds of `{start}`", f"{median:.2f}", f"< {start.most_s:g}", met, COMMAND)
        )
        rows.append(Row(f"torch in `{start}`", told, "no torch", not heavy, COMMAND))
    return rows


def cpu_seconds(start: Start) -> float:
    """CPU-seconds of one run of the command, children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run([sys.executable, *start.words])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def heavy_imports(start: Start) -> list[str]:
    """Which of the heavy packages the command has imported when it ends."""
    told = _run([sys.executable, "-X", "importtime", *start.words]).stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in told.splitlines() if "|" in line}
    return [name for name in HEAVY if name in imported]


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)


if __name__ == "__main__":
    print_rows(main())

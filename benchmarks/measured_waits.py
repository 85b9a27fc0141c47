"""What it costs a step that waits are measured and ranks are compared.

    python benchmarks/measured_waits.py --folder /tmp        # a minute

Trains the debug model on two gloo ranks. CPU-seconds of a call that is wrapped, its wait included,
beyond one that is not, times the calls of a step; and those of comparing, spread over the steps.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.benchmarks.table import Row, finish
from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.parallel import waits
from triptych.tests.helpers.pool import RankPool
from triptych.tests.helpers.runs import train
from triptych.train.hooks.slow_ranks import WINDOW_STEPS, SlowRanks
from triptych.train.json_lines import read_lines
from triptych.train.records import METRICS

COMMAND = "python benchmarks/measured_waits.py --folder /tmp"
LAYOUTS = {"dp 2": "parallel=single", "tp 2": "parallel=tp2"}
NUM_STEPS = 2 * WINDOW_STEPS + 1
NUM_CALLS = 20_000


class Cost(NamedTuple):
    """What a rank found."""

    num_waits: float
    """Measured spans of time in a step; a call and its wait are two."""
    span_s: float
    """CPU-seconds that measuring one takes."""
    comparing_s: float
    """CPU-seconds of a step."""


def main(argv: Sequence[str]) -> None:
    """Train in each layout; print a row for each."""
    options = parser_with_folder(__doc__ or "").parse_args(argv)
    rows = []
    for layout, words in LAYOUTS.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            rows.append(measure(layout, words, Path(name)))
    finish(rows)


def measure(layout: str, words: str, folder: Path) -> Row:
    """Of the rank that it costs most."""
    places = (f"run.dir={folder}/run", f"data.root={folder}/data", "run.checkpoint_every=1000")
    config = load_config([words, *places, f"train.num_steps={NUM_STEPS}"])
    pool = RankPool(2, folder / "pool")
    try:
        costs: list[Cost] = pool.run(cost_of_measuring, config=config)
    finally:
        pool.stop()
    steps = [line["step_time_s"] for line in read_lines(folder / "run" / METRICS)]
    worst = max(costs, key=lambda cost: cost.num_waits * cost.span_s + cost.comparing_s)
    taken_s = worst.num_waits * worst.span_s + worst.comparing_s
    share = taken_s / median(steps)
    told = (
        f"{share:.2%}: {worst.num_waits:.0f} x {worst.span_s * 1e6:.1f} us and "
        f"{worst.comparing_s * 1e6:.0f} us of {median(steps):.3f} s"
    )
    return Row(f"measuring waits, of a step, {layout}", told, "< 1 %", share < 0.01, COMMAND)


def cost_of_measuring(config: Config) -> Cost:
    """Train, and count; then take the time of calls that do nothing."""
    num_begun, comparing_s = 0, 0.0
    begin, before_step = waits._begin, SlowRanks.before_step

    def counted(*args: Any) -> Any:
        nonlocal num_begun
        num_begun += 1
        return begin(*args)

    def timed(*args: Any) -> None:
        nonlocal comparing_s
        begun_s = time.thread_time()
        before_step(*args)
        comparing_s += time.thread_time() - begun_s

    with (
        mock.patch.object(waits, "_begin", counted),
        mock.patch.object(SlowRanks, "before_step", timed),
    ):
        train(config)
    return Cost(num_begun / NUM_STEPS, span_s(), comparing_s / NUM_STEPS)


def span_s() -> float:
    """CPU-seconds of a wrapped call and its wait, less those of bare ones, over two."""
    work, group = SimpleNamespace(), dist.group.WORLD
    call = waits._call("allreduce", lambda *_: work)
    wait = waits._wait(lambda *_: True)
    bare_call, bare_wait = (lambda *_: work), (lambda *_: True)
    taken = []
    for first, second in ((call, wait), (bare_call, bare_wait)):
        begun_s = time.thread_time()
        for _ in range(NUM_CALLS):
            first(group)
            second(work)
        taken.append(time.thread_time() - begun_s)
    return (taken[0] - taken[1]) / NUM_CALLS / 2


if __name__ == "__main__":
    main(sys.argv[1:])

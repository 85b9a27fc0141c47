"""What a save costs training, and how fast it writes: against waiting for it, and a plain write.

    python benchmarks/saves.py --folder /tmp [--saves 12] [model.language.num_layers=8 ...]

Trains one process on random weights, with a save every few steps. Every other save is waited for.
After each of these, the same bytes are written to the same folder as plainly as can be, and synced.
So the arms take turns, and what else the machine does falls on both.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.benchmarks.table import Row, finish, spread
from triptych.checkpoints.direct_file import WRITE_BYTES
from triptych.configs.compose import load_config
from triptych.configs.validate import validate
from triptych.train.hooks.checkpoint import Checkpointing
from triptych.train.hooks.hook import StepEvent
from triptych.train.run import pretrain

COMMAND = "python benchmarks/saves.py --folder /tmp"
EVERY = 6
SIZES = (
    "model.language.hidden_size=512",
    "model.language.num_layers=8",
    "model.language.head_dim=128",
    "model.language.mrope_section=[16,24,24]",
    "model.language.intermediate_size=1536",
    "train.seq_len=256",
    "train.global_batch_size=1",
    "stage.token_budget=1000000000",
    f"run.checkpoint_every={EVERY}",
)


class TimedSaves(Checkpointing):
    """Waits for every other save, then writes as many bytes plainly."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stalls_s: list[float] = []
        self.waited_s: list[float] = []
        self.rates: list[float] = []
        self.next_s: list[float] = []
        self.other_s: list[float] = []
        self._num_saves = 0
        found.append(self)

    def after_step(self, event: StepEvent) -> None:
        """Time it; which step it is decides what for."""
        step_s = event.metrics["step_time_s"]
        was_saving = self._save.step is not None
        if event.state.step > EVERY:  # the first save makes the buffer, the first step loads
            since_save = event.state.step % EVERY
            if since_save == 1 and was_saving:
                self.next_s.append(step_s)
            elif not was_saving and since_save not in (0, 1):
                self.other_s.append(step_s)
        begin = time.perf_counter()
        super().after_step(event)
        stall_s = time.perf_counter() - begin
        if event.state.step % EVERY or event.is_last:
            return
        self._num_saves += 1
        if self._num_saves == 1:
            return
        if self._num_saves % 2:
            self.stalls_s.append(stall_s)
            return
        self._advance(wait=True, proven=True)
        self.waited_s.append(time.perf_counter() - begin)
        written_s = self.waited_s[-1] - stall_s
        self.rates.append(self._plain_write_s() / written_s)

    def _plain_write_s(self) -> float:
        content = memoryview(self._snapshot._shards._buffer.content.numpy())
        path = Path(self._config.run.dir) / "plain"
        begin = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            while len(content) > 0:
                content = content[file.write(content[:WRITE_BYTES]) :]
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
        path.unlink()
        return seconds


found: list[TimedSaves] = []


def main(argv: Sequence[str]) -> None:
    """Train, and print a row for each claim."""
    parser = parser_with_folder(__doc__ or "")
    parser.add_argument("--saves", type=int, default=12)
    parser.add_argument("words", nargs="*", help="more of the run's configuration")
    options = parser.parse_args(argv)
    if options.saves < 3:
        parser.error("--saves: at least 3; the first is left out, of the others every other waits")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        words = [*SIZES, f"run.dir={folder}/run", f"data.root={folder}/data"]
        words += [f"train.num_steps={EVERY * options.saves + 1}", *options.words]
        config = load_config(words)
        validate(config, world_size=1)
        with mock.patch("triptych.train.run.Checkpointing", TimedSaves):
            pretrain(config)
    finish(rows(found[0]))


def rows(timed: TimedSaves) -> list[Row]:
    """Ratios of medians; the spread is that of the values."""
    stall, waited = statistics.median(timed.stalls_s), statistics.median(timed.waited_s)
    after, other = statistics.median(timed.next_s), statistics.median(timed.other_s)
    rate = statistics.median(timed.rates)
    size = f"{timed._snapshot.num_bytes / 1e6:.0f} MB"
    return [
        Row(
            f"stall of a save beside training, {size}, against one that is waited for",
            f"{stall / waited:.1%}: {spread(timed.stalls_s)} s of {spread(timed.waited_s)} s",
            "<= 15 %",
            stall <= 0.15 * waited,
            COMMAND,
        ),
        Row(
            "the step after it, against the median of those without a save in flight",
            f"{after / other:.2f}x: {spread(timed.next_s)} s of {spread(timed.other_s)} s",
            "<= 1.05x",
            after <= 1.05 * other,
            COMMAND,
        ),
        Row(
            "bandwidth of a save, checks, hash and commit included, against a plain synced write",
            f"{spread(timed.rates)}x",
            ">= 0.8x",
            rate >= 0.8,
            COMMAND,
        ),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])

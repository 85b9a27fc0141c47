"""What a save costs training, and how fast it writes.

    python benchmarks/saves.py [FOLDER] [--saves 6] [key=value ...]

Trains a wide debug model on one process. Every other save is waited for at once, as a synchronous
one would be; so both are measured in one run, under whatever else the machine does. Then the same
part is written as a save writes it, and as one plain file with the same fsync, in turns.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

from triptych.checkpoints.background_save import BackgroundSave
from triptych.checkpoints.run_state import RunSnapshot
from triptych.checkpoints.shard_file import WRITE_BYTES
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.compose import load_config
from triptych.parallel.agree import SingleProcess
from triptych.train.hooks.checkpoint import Checkpointing
from triptych.train.hooks.hook import StepEvent
from triptych.train.run import pretrain

WIDE = ("model.language.intermediate_size=16384", "run.checkpoint_every=10", "run.keep=2")
BESIDE, WAITED_FOR = "beside training", "waited for"


class Measured(Checkpointing):
    """Times each save, and the steps."""

    stalls: dict[str, list[float]]
    next_steps: list[float]
    other_steps: list[float]
    snapshot: RunSnapshot

    def after_step(self, event: StepEvent) -> None:
        """As the hook does; waits for every other save."""
        step_s, busy = event.metrics["step_time_s"], self._save.step is not None
        if event.state.step > 1:  # the first is no step like the others
            (Measured.next_steps if busy else Measured.other_steps).append(step_s)
        number, rest = divmod(event.state.step, self._config.run.checkpoint_every)
        start = time.perf_counter()
        super().after_step(event)
        kind = WAITED_FOR if number % 2 else BESIDE
        if not rest and number > 1 and not event.is_last:  # the first touches its memory
            if kind == WAITED_FOR:
                self._advance(wait=True, proven=False)
            Measured.stalls[kind].append(time.perf_counter() - start)
        Measured.snapshot = self._snapshot


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="where to write: the disk that is measured")
    parser.add_argument("--saves", type=int, default=6, help="saves of either kind")
    options, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        train(Path(folder), options.saves, words)
        bandwidth(Path(folder), options.saves)


def train(folder: Path, num_saves: int, words: list[str]) -> None:
    """Ratios of stalls, and of the steps beside a save."""
    Measured.stalls = {BESIDE: [], WAITED_FOR: []}
    Measured.next_steps, Measured.other_steps = [], []
    steps = f"train.num_steps={10 * (2 * num_saves + 2) + 5}"
    config = load_config([*WIDE, steps, f"run.dir={folder}/run", *words])
    with mock.patch("triptych.train.run.Checkpointing", Measured):
        pretrain(config)
    stalls = {kind: median(seconds) for kind, seconds in Measured.stalls.items()}
    step_s, next_s = median(Measured.other_steps), median(Measured.next_steps)
    print(f"part: {Measured.snapshot.num_bytes / 2**20:.0f} MiB")
    for kind, stall_s in stalls.items():
        print(f"stall, {kind}: {stall_s * 1e3:.0f} ms, median of {len(Measured.stalls[kind])}")
    print(f"ratio of stalls: {stalls[BESIDE] / stalls[WAITED_FOR]:.3f}")
    print(
        f"steps beside a save: {len(Measured.next_steps)}, median {next_s / step_s:.3f} of others'"
    )


def bandwidth(folder: Path, num_saves: int) -> None:
    """A save's writing, hashing, syncing and commit against one plain file."""
    part, ranks = Measured.snapshot, SingleProcess()
    store = CheckpointStore(folder / "bandwidth", ranks)
    seconds: dict[str, list[float]] = {"save": [], "plain": []}

    def save(step: int) -> None:
        background = BackgroundSave(store, ranks, keep=None)
        background.begin(step, part, {})
        background.poll(wait=True)
        background.close()

    def plain(step: int) -> None:
        content = memoryview(part._shards._buffer.content.numpy())
        with (folder / f"plain_{step}").open("wb", buffering=0) as file:
            while len(content) > 0:
                content = content[file.write(content[:WRITE_BYTES]) :]
            os.fsync(file.fileno())

    kinds: dict[str, Callable[[int], None]] = {"save": save, "plain": plain}
    for step in range(1, num_saves + 1):
        for kind, write in kinds.items():
            start = time.perf_counter()
            write(step)
            seconds[kind].append(time.perf_counter() - start)
    rates = {kind: part.num_bytes / 2**20 / median(s) for kind, s in seconds.items()}
    told = ", ".join(f"{kind} {rate:.0f} MiB/s" for kind, rate in rates.items())
    print(f"bandwidth: {told}, ratio {rates['save'] / rates['plain']:.2f}")


if __name__ == "__main__":
    main()

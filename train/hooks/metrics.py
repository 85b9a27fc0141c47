"""One JSON object per step in ``metrics.jsonl``, and the same to whoever tracks experiments."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from triptych.configs.schema import Config
from triptych.costs.flops import stage_flops
from triptych.data.types import Step
from triptych.parallel.mesh import Mesh
from triptych.train.console import say
from triptych.train.hooks.hook import StepEvent
from triptych.train.state import TrainState
from triptych.train.step import StepResult


def step_metrics(
    config: Config, state: TrainState, result: StepResult, step_time_s: float, num_ranks: int
) -> dict[str, Any]:
    """The numbers of one step, over all ranks.

    ``fill`` is the share of the packs' positions that hold tokens. ``flops`` are those of the model
    (costs/flops.py): of the patches, segments and supervised tokens that were there, padding and
    recomputation not counted. ``mfu`` is their rate over what the ranks could do at
    ``cluster.peak_tflops``.
    """
    totals, load = result.totals, result.totals.workload
    peak = config.cluster.peak_tflops
    skipped = result.loss is None
    flops = 0.0 if skipped else stage_flops(config.model, config.stage, load)
    flops_per_s = flops / step_time_s
    return {
        "step": state.step,
        "stage": config.stage.name,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "num_tokens": load.num_tokens,
        "num_supervised_tokens": totals.num_supervised_tokens,
        "num_patches": load.num_patches,
        "num_unreadable": totals.num_unreadable,
        "consumed_tokens": state.consumed_tokens,
        "consumed_samples": state.consumed_samples,
        "step_time_s": step_time_s,
        "tokens_per_s": load.num_tokens / step_time_s,
        "flops": flops,
        "flops_per_s": flops_per_s,
        "mfu": None if peak is None else flops_per_s / (num_ranks * peak * 1e12),
        "fill": load.num_tokens / (config.train.global_batch_size * config.train.seq_len),
    }


class JsonLines:
    """A file of one JSON object per step, that a resumed run continues without a step twice."""

    def __init__(self, path: Path, from_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            keep_until(path, from_step)
        self._file: TextIO = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append, so that a killed process loses no finished step."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def keep_until(path: Path, last_step: int) -> None:
    """Drop steps after ``last_step``, which will be trained again, and a half-written line."""
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _whole_lines(path: Path) -> Iterable[str]:
    with path.open() as file:
        return [line for line in file if line.endswith("\n")]


class MetricsFile:
    """Writes ``metrics.jsonl``; on rank 0."""

    def __init__(self, path: Path, from_step: int) -> None:
        self._lines = JsonLines(path, from_step)

    def after_step(self, event: StepEvent) -> None:
        """Append the step's metrics."""
        self._lines.write(event.metrics)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class Ledger:
    """Writes which packs and samples this data-parallel rank trained on, step by step.

    On its reading rank.
    """

    def __init__(self, path: Path, from_step: int) -> None:
        self._lines = JsonLines(path, from_step)

    def after_step(self, event: StepEvent) -> None:
        """Append the step's packs, by number, and its samples, as [source, index]."""
        step: Step = event.step
        samples = [sample for batch in step.microbatches for sample in batch.sample_ids]
        self._lines.write({"step": event.state.step, "packs": list(step.packs), "samples": samples})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class Quarantine:
    """Writes the samples whose media could not be read, with the reason; on the reading ranks."""

    def __init__(self, path: Path, mesh: Mesh) -> None:
        self._path, self._mesh = path, mesh
        self._told = False

    def after_step(self, event: StepEvent) -> None:
        """Append the step's unreadable samples."""
        number = event.result.totals.num_unreadable
        if number and not self._told:
            say(
                self._mesh,
                f"samples that cannot be read are left out of the loss, {number} in this step; "
                f"{self._path} names them and says why, and metrics.jsonl counts them",
            )
            self._told = True
        if not event.step.bad:
            return
        with self._path.open("a") as file:
            for microbatch, segment, reason in event.step.bad:
                source, index = event.step.microbatches[microbatch].sample_ids[segment]
                record = {"step": event.state.step, "source": source, "index": index}
                file.write(json.dumps({**record, "reason": reason}) + "\n")

    def close(self) -> None:
        """Nothing is kept open."""

"""The numbers of a step, as ``metrics.jsonl`` and the trackers get them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psutil

from triptych.configs.schema import Config
from triptych.costs.flops import stage_flops
from triptych.parallel.device import peak_memory_bytes
from triptych.train.state import TrainState
from triptych.train.step import StepResult


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step on this rank; what hooks do is not counted."""

    data_s: float
    """Waiting for the loader: 0 where it reads ahead fast enough."""
    compute_s: float
    """All else, so also waiting for ranks that wait for their loader."""

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.data_s + self.compute_s


def step_metrics(
    config: Config, state: TrainState, result: StepResult, times: StepTimes, num_ranks: int
) -> dict[str, Any]:
    """The numbers of one step, over all ranks; times, but ``decode_s``, and memory are this rank's.

    ``fill`` is the share of the packs' positions that hold tokens. ``flops`` are those of the model
    (costs/flops.py): of the patches, segments and supervised tokens that were there, padding and
    recomputation not counted. ``mfu`` is their rate over what the ranks could do at
    ``cluster.peak_tflops``.
    """
    totals, load = result.totals, result.totals.workload
    sources = config.data.mixtures[config.stage.name]
    peak = config.cluster.peak_tflops
    has_loss = totals.num_supervised_tokens > 0
    flops = stage_flops(config.model, config.stage, load) if has_loss else 0.0
    flops_per_s = flops / times.step_s
    return {
        "step": state.step,
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "stage": config.stage.name,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "skipped": None if result.veto is None else result.veto.cause.value,
        "lr": result.lr,
        "num_tokens": load.num_tokens,
        "num_supervised_tokens": totals.num_supervised_tokens,
        "num_patches": load.num_patches,
        "num_unreadable": totals.num_unreadable,
        "samples_by_source": dict(zip(sources, totals.samples_by_source, strict=True)),
        "tokens_by_source": dict(zip(sources, totals.tokens_by_source, strict=True)),
        "num_decoded": totals.media_work.num_decoded,
        "num_kept": totals.media_work.num_kept,
        "decode_s": totals.media_work.decode_us / 1e6,
        "read_bytes": totals.media_work.read_bytes,
        "consumed_tokens": state.consumed_tokens,
        "consumed_samples": state.consumed_samples,
        "step_time_s": times.step_s,
        "data_s": times.data_s,
        "compute_s": times.compute_s,
        "tokens_per_s": load.num_tokens / times.step_s,
        "flops": flops,
        "flops_per_s": flops_per_s,
        "mfu": None if peak is None else flops_per_s / (num_ranks * peak * 1e12),
        "fill": load.num_tokens / (config.train.global_batch_size * config.train.seq_len),
        "host_memory_bytes": psutil.Process().memory_info().rss,
        "device_memory_bytes": peak_memory_bytes(),
    }

"""Whole runs on the ranks of a pool, by ``pretrain``, from the words of its command line."""

import contextlib
import io
import itertools
import json
import os
import pkgutil
import signal
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from triptych.checkpoints.background_save import BackgroundSave
from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.configs.validate import validate
from triptych.errors import TriptychError
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.pool import RankFailureError, RankPool
from triptych.train.console import console
from triptych.train.run import pretrain

SMALL = (
    "model.vision.hidden_size=64",
    "model.vision.depth=2",
    "model.vision.intermediate_size=128",
    "model.language.hidden_size=96",
    "model.language.head_dim=24",
    "model.language.mrope_section=[4,4,4]",
    "model.language.intermediate_size=128",
    "train.seq_len=128",
    "train.global_batch_size=4",
    "stage.token_budget=40000",
    "data.window=64",
    f"cluster.timeout_s={HANG_S}",
    f"cluster.hang_s={HANG_S}",
)
"""A tenth of the debug model, on packs of half the length."""

LAYOUTS = {
    "single": (1, "single"),
    "dp2": (2, "single"),
    "tp2": (2, "tp2"),
    "pp2": (2, "pp2"),
    "tp2 pp2": (4, "tp2_pp2"),
    "dp2 pp2 interleaved": (4, "pp2 parallel.vpp=2"),
}
"""Name -> number of ranks, choice of the group ``parallel`` and what else makes the layout."""
STAGE2 = ("strings", "captions", "text", "every_kind")
"""Sources of stage 2 on the sample data, as its plan numbers them."""
COVERING = ("single", "tp2 pp2", "dp2 pp2 interleaved")
"""What make test runs where make test-full runs all. Each axis is split in one of these, as in the
layouts that split it alone: a rank that leaves out its share, or counts it twice, differs from the
single process there too. What an axis does alone, steps of tests/parallel/test_layouts.py show.
"""
OVERLAP = [f"parallel.overlap.{what}=true" for what in ("grad_reduce", "param_gather", "p2p")]


class Runs:
    """Runs of the small model in folders of their own."""

    def __init__(self, pool: Callable[[int], RankPool], data: Path, folder: Path) -> None:
        self._pool, self._data, self._folder = pool, data, folder

    def words(self, name: str, layout: str, *more: str) -> list[str]:
        """A command line; the last word wins."""
        parallel = f"parallel={LAYOUTS[layout][1]}".split()
        places = (f"data.root={self._data}", f"run.dir={self.dir(name)}")
        return [*SMALL, *parallel, *places, *more]

    def dir(self, name: str) -> Path:
        """The run folder of this name."""
        return self._folder / name

    def train(self, name: str, layout: str, *more: str) -> str:
        """Run it; returns what rank 0 wrote to the terminal. The other ranks must be silent."""
        outputs = self.call(train, name, layout, *more)
        assert not any(outputs[1:]), outputs
        return outputs[0]

    def refusal(self, name: str, layout: str, *more: str) -> str:
        """Run it, which must be refused with the same message on every rank."""
        messages = self.call(refusal, name, layout, *more)
        assert len(set(messages)) == 1, messages
        return messages[0]

    def kill(self, name: str, layout: str, *more: str, target: str, call: int) -> None:
        """Run it until all ranks kill themselves; see ``train_and_die``."""
        with pytest.raises(RankFailureError, match="died, exit code -9"):
            self.call(train_and_die, name, layout, *more, target=target, call=call)

    def call(self, function: Callable[..., Any], name: str, layout: str, *more: str, **kwargs: Any):
        """``function(config, **kwargs)`` on the ranks of the layout.

        The command line is read once, here: on every rank it would cost as much as three steps.
        """
        config = load_config(self.words(name, layout, *more))
        return self._pool(LAYOUTS[layout][0]).run(function, config=config, **kwargs)


def train(config: Config) -> str:
    """Train; returns what this rank wrote to the terminal. Every rank must call this."""
    validate(config, world_size=dist.get_world_size())
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        console(dist.get_rank()),
    ):
        pretrain(config)
    return output.getvalue()


def refusal(config: Config) -> str:
    """Train, which must be refused; returns the error as the terminal shows it."""
    try:
        train(config)
    except TriptychError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was refused")


def train_and_die(config: Config, target: str, call: int) -> None:
    """Train; every rank kills itself when it calls ``target`` for the ``call``-th time.

    As kill -9 does: nothing is flushed, no handler runs. Until then a save that is asked about is
    done, so what is on disk when they die depends on no clock.
    """
    results = BackgroundSave._results
    original, calls = pkgutil.resolve_name(target), itertools.count(1)

    def die(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    def of_done(save: BackgroundSave, future: futures.Future[Any], *, wait: bool) -> Any:
        return results(save, future, wait=True)

    with mock.patch(target, die), mock.patch.object(BackgroundSave, "_results", of_done):
        train(config)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


TIMES = (
    "time",
    "step_time_s",
    "data_s",
    "compute_s",
    "decode_s",
    "tokens_per_s",
    "flops_per_s",
    "mfu",
    "left_s",
)
MEMORY = ("host_memory_bytes", "device_memory_bytes")
"""The metrics that no two runs share."""


def without_times(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, without what depends on clock or layout."""
    left_out = (*TIMES, *MEMORY, "imbalance")
    return [{k: v for k, v in line.items() if k not in left_out} for line in metrics(run_dir)]


def losses(run_dir: Path) -> list[float]:
    """Loss of every step; steps are 1, 2, 3, ... without a gap or a repetition."""
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def packs(run_dir: Path) -> dict[int, list[int]]:
    """Step -> numbers of the packs of its global batch, sorted, from all dp ranks' ledgers."""
    found: dict[int, list[int]] = {}
    for ledger in (run_dir / "ledger").glob("*.jsonl"):
        for line in map(json.loads, ledger.read_text().splitlines()):
            found.setdefault(line["step"], []).extend(line["packs"])
    return {step: sorted(numbers) for step, numbers in sorted(found.items())}


def checkpoint_names(run_dir: Path) -> list[str]:
    """The folders in ``checkpoints``, by step."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))

"""launch/replay.py: the batch of a step again, as pictures and as a run of its own."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from triptych.errors import TriptychError
from triptych.launch import replay
from triptych.tests.helpers.runs import Runs, metrics, packs, train
from triptych.train.console import console

pytestmark = pytest.mark.distributed


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def run_dir(pool, digits, tmp_path_factory) -> Path:
    """Six steps on two ranks, saved after each second."""
    runs = Runs(pool, digits, tmp_path_factory.mktemp("replayed"))
    runs.call(train, "run", "dp2", "train.num_steps=6", "run.checkpoint_every=2")
    return runs.dir("run")


def replayed(words: tuple[str, ...]) -> str:
    """What the command says on this rank, on the ranks that call it."""
    output = io.StringIO()
    ranks = {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
    with (
        mock.patch.dict("os.environ", ranks),
        mock.patch("triptych.parallel.mesh.shutdown"),  # the pool's group stays
        contextlib.redirect_stdout(output),
        console(dist.get_rank()),
    ):
        try:
            replay.main(words)
        except TriptychError as error:
            return f"{type(error).__name__}: {error}"
    return output.getvalue()


def call(pool, num_ranks: int, run_dir: Path, *words: str) -> str:
    return pool(num_ranks).run(replayed, words=(str(run_dir), *words))[0]


def test_a_step_is_rebuilt_and_run_again_bit_for_bit(pool, run_dir):
    """Step 5 from the checkpoint of step 4; step 6 through step 5."""
    told = call(pool, 2, run_dir, "step=6", "--run", "--pictures", "1")
    assert f"step 6: packs {', '.join(map(str, packs(run_dir)[6]))}" in told
    [picture] = (run_dir / "replay" / "step_000000006").iterdir()
    assert picture.name == f"pack_{packs(run_dir)[6][0]:09d}.png"
    assert "3 more packs are not drawn" in told
    assert "step_000000004.0, step 4" in told
    assert "step 5: loss " in told
    assert "the same, bit for bit" in told
    line = metrics(run_dir)[5]
    wanted = f"step 6: loss {line['loss']:.9g}, then {line['loss']:.9g}, grad_norm "
    assert wanted + f"{line['grad_norm']:.9g}, then {line['grad_norm']:.9g}" in told
    table = told[told.index("samples, each alone") :].splitlines()[1:11]
    losses = [float(row.split()[2]) for row in table]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > line["loss"]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        slow({}, "the same but for rounding"),
        ({"loss": 1.5}, "they differ ("),
        slow({"loss": None, "grad_norm": None, "skipped": "not finite"}, "it is finite here: not"),
        slow(None, "does not tell of this step"),
    ],
)
def test_a_flipped_bit_is_told_from_bad_data(change, verdict, pool, run_dir, tmp_path):
    """By one process, whose layout is another than the run's."""
    lines = metrics(run_dir)
    changed = lines[:4] if change is None else [*lines[:4], {**lines[4], **change}]
    metrics_file = run_dir / "metrics.jsonl"
    before = metrics_file.read_bytes()
    try:
        metrics_file.write_text("".join(json.dumps(line) + "\n" for line in changed))
        told = call(pool, 1, run_dir, "step=5", "--run", "--pictures", "0")
    finally:
        metrics_file.write_bytes(before)
    assert verdict in told


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("step=9",), "DataError: .* has steps 1 to 6, but not step 9  -> step=6"),
        (("9",), "ConfigError: 9 names no step  -> step=1234, from 1 on"),
        (("step=1", "--run", "--pictures", "0"), "CheckpointError: .* no good checkpoint before"),
    ],
)
def test_what_cannot_be_replayed_is_refused(words, refused, pool, run_dir):
    told = call(pool, 1, run_dir, *words)
    assert re.search(refused, told), told

"""launch/replay.py: the batch of a step again, as pictures and as a run of its own."""

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from triptych.data.plan.order import Cursor
from triptych.data.types import Pack, SampleId
from triptych.errors import DataError, TriptychError
from triptych.launch import replay
from triptych.launch.inspection.step_of_run import packs_of_step, passed_over_before
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


def test_a_number_of_pictures_below_zero_is_refused(capsys):
    with pytest.raises(SystemExit):
        replay.main(["run", "step=1", "--pictures", "-1"])
    assert "--pictures: -1 must be a whole number from 0 on" in capsys.readouterr().err


def leave_ledger(run_dir: Path, *lines: dict[str, Any]) -> None:
    (run_dir / "ledger").mkdir(parents=True, exist_ok=True)
    number = len(list((run_dir / "ledger").iterdir()))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "ledger" / f"dp_{number:05d}.jsonl").write_text(text)


def test_the_ledger_tells_where_a_run_went_on_after_it_went_back(tmp_path):
    back = {"step": 5, "packs": [28, 30], "samples": [], "passed_over": {"packs": [16, 26]}}
    leave_ledger(tmp_path, {"step": 4, "packs": [12], "samples": []}, back)
    back = {"step": 5, "packs": [29, 31], "samples": [], "passed_over": {"packs": [17, 27]}}
    leave_ledger(tmp_path, {"step": 4, "packs": [13], "samples": []}, back)
    assert passed_over_before(tmp_path) == {5: 28}


def test_data_that_end_before_a_pack_of_the_ledger_are_told_as_others(tmp_path):
    leave_ledger(tmp_path, {"step": 1, "packs": [0, 1], "samples": [[0, 0], [0, 1]]})
    there = [Pack(0, (SampleId(0, 0),), 9, 0)]
    start = Cursor((0,), (0,))
    plan = SimpleNamespace(start=start, hash="", next_packs=lambda *_: (there, start))
    with pytest.raises(DataError, match="are not what they were  -> restore them"):
        packs_of_step(tmp_path, 1, plan)

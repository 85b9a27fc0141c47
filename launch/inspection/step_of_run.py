"""The packs that a step of a run was trained on: from its plan, checked against its ledger."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triptych.checkpoints.layout import CHECKPOINTS, CheckpointFolder, parse_step, step_folders
from triptych.configs.compose import read_config
from triptych.configs.schema import Config
from triptych.data.plan.order import Cursor, Plan
from triptych.data.types import Pack
from triptych.errors import ConfigError, DataError
from triptych.train.hooks.ledger import LEDGER
from triptych.train.json_lines import read_lines
from triptych.train.state import TrainState


def config_of_run(run_dir: Path) -> Config:
    """As its last start had it.

    Raises:
        ConfigError: it is the folder of no run.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run_dir} has no config.yaml  -> name the folder of a run")
    return read_config(file)


def packs_of_step(run_dir: Path, step: int, plan: Plan) -> list[Pack]:
    """In the order of their numbers.

    Raises:
        DataError: the ledger has no such step, or the data are not what they were then.
    """
    lines = _ledger_lines(run_dir, step)
    numbers = sorted(pack for line in lines for pack in line["packs"])
    cursor = _cursor_before(run_dir, numbers[0], plan)
    found, _ = plan.next_packs(cursor, numbers[-1] + 1 - cursor.num_packs)
    packs = [pack for pack in found if pack.number in numbers]
    planned = sorted(tuple(sample) for pack in packs for sample in pack.samples)
    if planned != sorted(tuple(sample) for line in lines for sample in line["samples"]):
        raise DataError(
            f"packs {numbers[0]} to {numbers[-1]} have other samples in {run_dir / LEDGER} than in "
            f"the plan of {run_dir / 'config.yaml'}: datasets, mixture or seed are not what they "
            "were  -> restore them"
        )
    return packs


def passed_over_before(run_dir: Path) -> dict[int, int]:
    """Step before which the run had gone back -> the first pack after those it passed over."""
    ends: dict[int, int] = {}
    for line in _ledger(run_dir):
        for pack in line.get("passed_over", {}).get("packs", ()):
            ends[line["step"]] = max(ends.get(line["step"], 0), pack + 1)
    return ends


def _ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of every data-parallel rank."""
    files = sorted((run_dir / LEDGER).glob("dp_*.jsonl"))
    return [line for file in files for line in read_lines(file)]


def _ledger_lines(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Those of a step."""
    lines = _ledger(run_dir)
    if not lines:
        raise DataError(f"{run_dir / LEDGER} tells of no step  -> name the folder of a run")
    steps = [line["step"] for line in lines]
    if step not in steps:
        raise DataError(
            f"{run_dir / LEDGER} has steps {min(steps)} to {max(steps)}, but not step {step}"
            f"  -> step={max(steps)}"
        )
    return [line for line in lines if line["step"] == step]


def _cursor_before(run_dir: Path, pack: int, plan: Plan) -> Cursor:
    """A place in the plan, the nearest that is known before a pack."""
    best = plan.start
    for _, state in saved_places(run_dir):
        is_before = best.num_packs < state.cursor.num_packs <= pack
        if is_before and state.segments[-1].plan == plan.hash:
            best = state.cursor
    return best


def saved_places(run_dir: Path) -> Iterator[tuple[Path, TrainState]]:
    """The run's checkpoints and where it stood in each, newest first; unread ones are left out."""
    for folder in step_folders(run_dir / CHECKPOINTS):
        try:
            numbers = json.loads(CheckpointFolder(folder).numbers.read_text())
            state = TrainState.from_json(numbers["train"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if state.step == parse_step(folder.name).step:
            yield folder, state

"""What a run has left in its folder, for people.

It may be damaged, missing, or being written: what cannot be read is told in ``notes``, and keeps
nothing else from being shown. Nothing is changed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from triptych.checkpoints.layout import (
    CHECKPOINTS,
    ENVIRONMENT,
    CheckpointFolder,
    state_of,
)
from triptych.checkpoints.manifest import read_manifest
from triptych.configs.changes import saved_values
from triptych.errors import CheckpointError
from triptych.launch.reporting.step_table import LARGEST_STEP, StepTable, num_lines, read_step_table
from triptych.train.events import EVENTS, read_events
from triptych.train.json_lines import read_lines
from triptych.train.records import METRICS, QUARANTINE

SHEETS = ("*contact_sheet*.png", "evaluation/step_*.png")
"""Pictures of samples with what the model answered; of each, the last by name is shown."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint as its folder's name and its manifest describe it; none of it is verified."""

    name: str
    saved: datetime | None
    num_bytes: int | None
    is_proven: bool
    told: str
    """Stage and layout, or why it cannot be used."""


@dataclass(slots=True)
class UnreadableGroup:
    """Samples of one source that could not be read for the same cause."""

    source: str
    cause: str
    count: int
    first_step: int
    last_step: int
    reason: str
    """Of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Everything that a page says of one run."""

    name: str
    """The folder as it was typed, short enough to tell runs of one page apart."""
    folder: Path
    steps: StepTable
    events: list[dict[str, Any]]
    """Oldest first."""
    unreadable: list[UnreadableGroup]
    """The most samples first."""
    checkpoints: list[SavedCheckpoint]
    """Newest first."""
    config: dict[str, str]
    """Dotted key -> value; empty where it cannot be read."""
    environment: dict[str, str]
    sheets: list[Path]
    notes: list[str]


@dataclass(slots=True)
class _Reading:
    """Reads parts, and keeps what went wrong."""

    folder: Path
    notes: list[str] = field(default_factory=list)

    def part(self, what: str, read: Callable[[Path], T], empty: T) -> T:
        """``read(folder / what)``, or ``empty`` with a note if it fails."""
        try:
            return read(self.folder / what)
        except Exception as error:  # whatever a damaged file makes of its reader
            self.notes.append(f"{what} cannot be read: {type(error).__name__}: {error}")
            return empty


def read_run(folder: Path, name: str) -> RunRecord:
    """Read what there is."""
    reading = _Reading(folder)
    steps = reading.part(METRICS, read_step_table, StepTable({}, "", 0))
    events: list[dict[str, Any]] = []
    events = reading.part(EVENTS, _events, events)
    for what, lost in (
        (METRICS, steps.num_unreadable_lines),
        (EVENTS, reading.part(EVENTS, num_lines, 0) - len(events)),
    ):
        if lost > 0:
            reading.notes.append(f"{what}: {lost:,} damaged lines are passed over")
    return RunRecord(
        name=name,
        folder=folder,
        steps=steps,
        events=events,
        unreadable=reading.part(QUARANTINE, _unreadable, []),
        checkpoints=reading.part(CHECKPOINTS, _checkpoints, []),
        config=reading.part("config.yaml", _config, {}),
        environment=reading.part(ENVIRONMENT, _environment, {}),
        sheets=reading.part(".", contact_sheets, []),
        notes=reading.notes,
    )


def _events(path: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(path.parent) if 0 <= event["step"] <= LARGEST_STEP]


def _config(path: Path) -> dict[str, str]:
    return saved_values(path) if path.exists() else {}


def _environment(path: Path) -> dict[str, str]:
    """Its entries, those of groups as ``group name``."""
    rows: dict[str, str] = {}
    for name, value in json.loads(path.read_text()).items() if path.exists() else ():
        inner = {f"{name} {key}": v for key, v in value.items()} if isinstance(value, dict) else {}
        rows |= {key: _text(v) for key, v in (inner or {name: value}).items()}
    return rows


def _text(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _unreadable(folder: Path) -> list[UnreadableGroup]:
    groups: dict[tuple[str, str], UnreadableGroup] = {}
    for file in sorted(folder.glob("dp_*.jsonl")):
        for line in read_lines(file):
            source, cause = str(line.get("name", "unknown")), str(line.get("cause", "unknown"))
            step, reason = line["step"], str(line.get("reason", ""))
            new = UnreadableGroup(source, cause, 0, step, step, reason)
            group = groups.setdefault((source, cause), new)
            group.count += 1
            group.first_step = min(group.first_step, step)
            group.last_step = max(group.last_step, step)
    return sorted(groups.values(), key=lambda group: -group.count)


def _checkpoints(root: Path) -> list[SavedCheckpoint]:
    """Of every state, a damaged one too."""
    folders = root.iterdir() if root.is_dir() else ()
    named = [folder for folder in folders if state_of(folder.name) is not None]
    return [_checkpoint(folder) for folder in sorted(named, key=_age, reverse=True)]


def _age(folder: Path) -> tuple[int, int]:
    step, attempt = folder.name.removeprefix("step_").split(".")[:2]
    return int(attempt.split("_")[0]), int(step)


def _checkpoint(folder: Path) -> SavedCheckpoint:
    state = state_of(folder.name)
    try:
        manifest = read_manifest(folder)
        saved = datetime.fromtimestamp(CheckpointFolder(folder).commit.stat().st_mtime)
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = "is being written, or was left behind" if state == ".tmp" else str(error)
        return SavedCheckpoint(folder.name, None, None, is_proven=False, told=why)
    told = [str(manifest.info[key]) for key in ("stage", "layout") if key in manifest.info]
    return SavedCheckpoint(
        folder.name,
        saved.astimezone(),
        sum(file.size for file in manifest.files.values()),
        is_proven=manifest.info.get("proven") is True,
        told=", ".join([*([f"set aside as {state}"] if state else []), *told]),
    )


def contact_sheets(folder: Path) -> list[Path]:
    """The newest of each kind."""
    return [path for pattern in SHEETS for path in sorted(folder.glob(pattern))[-1:]]

"""What lies where among the checkpoints of a run: the one place that knows the names.

    run/checkpoints/
      step_000012000.0/       step.attempt; the attempt counts the starts of the run
        shards/               weights and optimizer state, two files of each rank
          rank_00003.bin      its part, byte by byte
          rank_00003.json     which elements of which tensors these are
        rng/rank_00003.safetensors    random states, one file of each rank
        data.json             position in the data, and what else is a number
        config.yaml           configuration of the run; an imported checkpoint has none
        model.json            what model the weights are of
        environment.json      git commit, host, device and versions, for people
        MANIFEST.json         every file with size and hash
        COMMIT                hash of the manifest, written last
      step_000012500.1.tmp/   being written; becomes step_000012500.1 once COMMIT is in it
      step_000011500.0.damaged/   set aside; .damaged_2 where there is one
      latest                  a hint for people and scripts; nothing here reads it

Newest means highest attempt, then highest step: a run that was sent back to an earlier step goes on
from what it saved last, not from the branch it left. A start that saves has a higher attempt than
all before it, so no name is used twice.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CHECKPOINTS = "checkpoints"
"""The folder in ``run.dir``."""
LATEST = "latest"
ENVIRONMENT = "environment.json"
"""Also in ``run.dir``."""
MANIFEST = "MANIFEST.json"
COMMIT = "COMMIT"

_STEP = re.compile(r"step_(\d+)\.(\d+)((?:\.tmp|\.damaged|\.deleted)(?:_\d+)?)?")
_OWNER = re.compile(r"rank_(\d+)[_.]")


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """The files of one checkpoint, by what they are."""

    path: Path

    @property
    def shards(self) -> Path:
        """The folder of weights and optimizer state."""
        return self.path / "shards"

    @property
    def numbers(self) -> Path:
        """Where training stood: position in the data, updates made."""
        return self.path / "data.json"

    @property
    def config(self) -> Path:
        """The configuration of the run that saved it."""
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        """What model the weights are of."""
        return self.path / "model.json"

    @property
    def environment(self) -> Path:
        """Git commit, host, device and versions, for people."""
        return self.path / ENVIRONMENT

    @property
    def manifest(self) -> Path:
        """Every file with size and hash."""
        return self.path / MANIFEST

    @property
    def commit(self) -> Path:
        """The hash of the manifest; without it, a folder is no checkpoint."""
        return self.path / COMMIT

    def random_state(self, rank: int) -> Path:
        """The random states of one rank."""
        return self._random_states / f"rank_{rank:05d}.safetensors"

    @property
    def num_random_states(self) -> int:
        """Ranks that left theirs."""
        return len(list(self._random_states.glob("rank_*.safetensors")))

    @property
    def _random_states(self) -> Path:
        return self.path / "rng"

    def make(self) -> None:
        """Make the folder, with those in it that all ranks write into."""
        for folder in (self.path, self.shards, self._random_states):
            folder.mkdir()


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """The two files of one rank in the folder of shards."""

    folder: Path
    rank: int

    @property
    def content(self) -> Path:
        """Bytes."""
        return self.folder / f"rank_{self.rank:05d}.bin"

    @property
    def index(self) -> Path:
        """Which elements of which tensors they are."""
        return self.folder / f"rank_{self.rank:05d}.json"

    @classmethod
    def all(cls, folder: Path) -> "list[ShardFiles]":
        """Of every rank that left its own, in order."""
        indices = sorted(folder.glob("rank_*.json"))
        return [cls(folder, writer_of(path.name)) for path in indices]


class StepName(NamedTuple):
    """Which checkpoint. Sorts by age: a later start is newer, whatever its step."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return f"step_{self.step:09d}.{self.attempt}"


def parse_step(name: str) -> StepName:
    """The step and attempt that a folder's name says, whatever suffix it has."""
    match = _STEP.fullmatch(name)
    assert match, name
    return StepName(attempt=int(match.group(2)), step=int(match.group(1)))


def state_of(name: str) -> str | None:
    """What a folder's name says of its state.

    ``""`` for a finished checkpoint, or ``".tmp"``, ``".damaged"``, ``".deleted"``; None where it
    is no checkpoint's name.
    """
    match = _STEP.fullmatch(name)
    return (match.group(3) or "").partition("_")[0] if match else None


def step_names(root: Path, state: str) -> list[str]:
    """Names of the checkpoint folders under ``root`` that are in one ``state_of``, sorted."""
    if not root.is_dir():
        return []
    folders = [entry.name for entry in sorted(root.iterdir()) if entry.is_dir()]
    return [name for name in folders if state_of(name) == state]


def next_attempt(root: Path) -> int:
    """Higher than that of anything under ``root`` that bears a checkpoint's name, also a file."""
    names = [entry.name for entry in root.iterdir() if state_of(entry.name) is not None]
    return 1 + max((parse_step(name).attempt for name in names), default=-1)


def free_name(folder: Path, state: str) -> Path:
    """The path of ``folder`` in another state, as ``.damaged``, that nothing has yet.

    ``.damaged_2`` and so on where something does: a restored checkpoint may be damaged again.
    """
    numbers = (state, *(f"{state}_{number}" for number in range(2, 1000)))
    paths = (folder.with_name(f"{parse_step(folder.name)}{more}") for more in numbers)
    return next(path for path in paths if not path.exists())


def step_folders(root: Path) -> list[Path]:
    """The folders under ``root`` that bear the name of a finished checkpoint, newest first."""
    return [root / name for name in sorted(step_names(root, ""), key=parse_step, reverse=True)]


def writer_of(name: str) -> int:
    """The rank that a file belongs to: named in ``rank_00003.bin``, else 0."""
    match = _OWNER.match(name.rsplit("/", 1)[-1])
    return int(match.group(1)) if match else 0

"""The checkpoints of one run on a file system that may fail, and a job that may die, at any moment.

    run/checkpoints/
      step_000012000.0/       step.attempt; the attempt counts the starts of the run
        shards/  rng/  ...    written by all ranks
        MANIFEST.json COMMIT  written by rank 0, COMMIT last
      step_000012500.1.tmp/   being written; becomes step_000012500.1 once COMMIT is in it
      step_000011500.0.damaged/
      latest                  a hint for people and scripts; nothing here reads it

Newest means highest attempt, then highest step: a run that was sent back to an earlier step goes on
from what it saved last, not from the branch it left. A start that saves has a higher attempt than
all before it, so no name is used twice.
"""

import logging
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from triptych.checkpoints.manifest import (
    COMMIT,
    CheckpointManifest,
    read_manifest,
    record_files,
    sync_folder,
    verify,
    write_manifest,
    write_synced,
)
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, on_every_rank, on_rank_0

T = TypeVar("T")
_log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)\.(\d+)(\.tmp|\.damaged|\.deleted)?")
_SUBFOLDERS = ("shards", "rng")


class StepName(NamedTuple):
    """Which checkpoint. Sorts by age: a later start is newer, whatever its step."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return f"step_{self.step:09d}.{self.attempt}"


class CheckpointStore:
    """Writes, finds and retires the checkpoints of one run.

    Only the run that owns ``root`` has one: it renames damaged folders and removes what a crash
    left behind. Whoever only reads uses ``locate``. Every rank of ``ranks`` must call every method.
    """

    def __init__(self, root: Path, ranks: Ranks) -> None:
        self.root = root
        self._ranks = ranks
        self._attempt: int | None = None
        self._ranksitted: Path | None = None

    def begin(self, step: int) -> Path:
        """A new temporary folder with ``shards/`` and ``rng/`` in it, for all ranks to write into.

        A file belongs to the rank in its name, ``__3_0.distcp`` or ``rank_3.pt``, which must have
        written it; any other file belongs to rank 0.

        Raises:
            CheckpointError: it cannot be made, or a rank does not see it.
        """
        folder = self._on_rank_0(lambda: self._claim(step))

        def see() -> None:
            if not folder.is_dir():
                raise CheckpointError(
                    f"{folder} was made by rank 0 and cannot be seen here; "
                    "run.dir must lie on a file system that all nodes share"
                )

        on_every_rank(self._ranks, see, os_error=CheckpointError)
        return folder

    def commit(self, folder: Path, info: dict[str, Any]) -> Path:
        """Make what the ranks wrote into ``folder`` a checkpoint; returns its final path.

        Args:
            folder: what ``begin`` returned.
            info: goes into the manifest as it is: plan hash, stage, layout. Plain JSON.

        Raises:
            CheckpointError: on every rank, if any rank failed; the folder then stays temporary.
        """
        self._ranks.all_gather(None)  # no rank still writes
        shares = on_every_rank(
            self._ranks,
            lambda: record_files(folder, self._ranks.rank),
            os_error=CheckpointError,
        )
        name = _parse(folder.name)
        files = {path: record for share in shares for path, record in sorted(share.items())}
        manifest = CheckpointManifest(step=name.step, attempt=name.attempt, info=info, files=files)

        def publish() -> Path:
            write_manifest(folder, manifest)
            final = self.root / str(name)
            _rename(folder, final)
            hint = self.root / "latest.tmp"
            write_synced(hint, f"{name}\n".encode())
            _rename(hint, self.root / "latest")
            return final

        self._ranksitted = self._on_rank_0(publish)
        return self._ranksitted

    def newest(self) -> Path | None:
        """The newest checkpoint whose every byte is as it was written; None in a run without any.

        A damaged one is renamed ``.damaged``, with a warning that says which file is wrong and how,
        and the one before is tried.

        Raises:
            CheckpointError: there are checkpoints, and none of them is good.
        """
        self._on_rank_0(self._tidy)
        rejected = []
        for folder in self._on_rank_0(lambda: step_folders(self.root)):
            problems = verify(folder, self._ranks)
            if not problems:
                return folder
            damaged = folder.with_name(f"{folder.name}.damaged")
            self._on_rank_0(partial(_rename, folder, damaged))
            rejected.append(_listed(f"{folder.name} is damaged, renamed {damaged.name}", problems))
            if self._ranks.rank == 0:
                _log.warning("checkpoint %s", rejected[-1])
        damaged_names = self._on_rank_0(lambda: _names(self.root, ".damaged"))
        if damaged_names:
            raise CheckpointError(
                _listed(f"{self.root} has no good checkpoint", rejected or damaged_names)
                + "\n  -> restore one from a backup, or start over in another run.dir"
            )
        return None

    def retain(self, keep: int) -> list[Path]:
        """Delete all but the ``keep`` newest checkpoints; returns what was deleted.

        Deletes nothing unless the newest is what this process has just committed, whose bytes are
        thus known to be good: the only good checkpoint is never deleted.
        """
        assert keep >= 1, "run.keep is validated"

        def delete() -> list[Path]:
            folders = step_folders(self.root)
            if not folders or folders[0] != self._ranksitted:
                return []
            for folder in folders[keep:]:
                _delete(folder)
            return folders[keep:]

        return self._on_rank_0(delete)

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        return on_rank_0(self._ranks, action, os_error=CheckpointError)

    def _claim(self, step: int) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        if self._attempt is None:
            self._attempt = 1 + max(
                (_parse(name).attempt for name in _names(self.root)), default=-1
            )
            self._tidy()
        folder = self.root / f"{StepName(self._attempt, step)}.tmp"
        if folder.exists() or folder.with_suffix("").exists():
            raise CheckpointError(f"step {step} was already saved as {folder.with_suffix('')}")
        folder.mkdir()
        for name in _SUBFOLDERS:
            (folder / name).mkdir()
        return folder

    def _tidy(self) -> None:
        """Finish or remove what a run that died left behind, half written or half deleted."""
        for name in _names(self.root, ".tmp"):
            folder = self.root / name
            try:
                read_manifest(folder)
            except CheckpointError:
                _delete(folder)
            else:  # died between COMMIT and the renaming
                _rename(folder, folder.with_suffix(""))
        for name in _names(self.root, ".deleted"):
            shutil.rmtree(self.root / name)


def step_folders(root: Path) -> list[Path]:
    """The folders under ``root`` that bear the name of a finished checkpoint, newest first."""
    return [root / name for name in sorted(_names(root, ""), key=_parse, reverse=True)]


def locate(path: Path, ranks: Ranks) -> Path:
    """The checkpoint that a person means by ``path``, verified. Every rank must call this.

    Changes nothing, and falls back on nothing.

    Args:
        path: a run folder or its ``checkpoints`` folder, for the newest in it; or one checkpoint.
        ranks: who shares the reading.

    Raises:
        CheckpointError: there is none, with what was found instead; or it is damaged.
    """
    folder, others = on_rank_0(ranks, lambda: _resolve(path), os_error=CheckpointError)
    problems = verify(folder, ranks)
    if problems:
        advice = f"\n  -> the one before is {others[0]}; name it to use it" if others else ""
        raise CheckpointError(_listed(f"checkpoint {folder} is damaged", problems) + advice)
    return folder


def _resolve(path: Path) -> tuple[Path, list[Path]]:
    """The checkpoint that ``path`` names, and the older ones beside it."""
    if not path.exists():
        known = step_folders(path.parent)
        beside = f"; beside it: {', '.join(folder.name for folder in known)}" if known else ""
        raise CheckpointError(f"{path} does not exist{beside}  -> name a run or a checkpoint")
    if match := _NAME.fullmatch(path.name):
        if match.group(3):
            raise CheckpointError(f"{path} is no checkpoint: {match.group(3)[1:]}")
        older = [
            other for other in step_folders(path.parent) if _parse(other.name) < _parse(path.name)
        ]
        return path, older
    if (path / COMMIT).exists():  # a checkpoint copied under another name
        return path, []
    for root in (path / "checkpoints", path):
        if folders := step_folders(root):
            return folders[0], folders[1:]
    if damaged := [
        name for root in (path / "checkpoints", path) for name in _names(root, ".damaged")
    ]:
        raise CheckpointError(
            f"{path} has no good checkpoint, only {', '.join(damaged)}"
            "  -> restore one from a backup, or name another run"
        )
    if (path / "config.json").exists() and list(path.glob("*.safetensors*")):
        raise CheckpointError(
            f"{path} is a Hugging Face model -> convert it with launch/convert.py, name the result"
        )
    content = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else ["a file"]
    raise CheckpointError(
        f"{path} is neither a run folder, nor its checkpoints folder, nor a checkpoint; "
        f"found {', '.join(content[:8]) or 'nothing'} in it  -> name one of these"
    )


def _names(root: Path, suffix: str | None = None) -> list[str]:
    """Names of checkpoint folders under ``root``: all, or those with a suffix ('' = finished)."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in sorted(root.iterdir()))
    return [m.group() for m in matches if m and (suffix is None or (m.group(3) or "") == suffix)]


def _parse(name: str) -> StepName:
    match = _NAME.fullmatch(name)
    assert match, name
    return StepName(attempt=int(match.group(2)), step=int(match.group(1)))


def _rename(old: Path, new: Path) -> None:
    os.replace(old, new)
    sync_folder(new.parent)


def _delete(folder: Path) -> None:
    """Delete a folder such that a part of it can never be taken for a checkpoint."""
    doomed = folder.with_name(f"{_parse(folder.name)}.deleted")
    _rename(folder, doomed)
    shutil.rmtree(doomed)


def _listed(title: str, items: list[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {item}" for item in items)])

"""The checkpoints of one run on a file system that may fail, and a job that may die, at any moment.

``checkpoints/layout.py`` draws the folders and says which checkpoint is the newest.
"""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from triptych.checkpoints.checkpoint_writer import CheckpointWriter, rename
from triptych.checkpoints.layout import (
    CheckpointFolder,
    StepName,
    free_name,
    next_attempt,
    parse_step,
    step_folders,
    step_names,
)
from triptych.checkpoints.manifest import DamagedError, read_manifest, verify
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, on_every_rank, on_rank_0

SMALL_FILES_BYTES = 1 << 20
"""Manifest, indices, random states and configuration, about."""
T = TypeVar("T")
_log = logging.getLogger(__name__)


class CheckpointStore:
    """Begins, finds and retires the checkpoints of one run.

    Only the run that owns ``root`` has one: it renames damaged folders and removes what a crash
    left behind. Whoever only reads uses ``locate``. Every rank of ``ranks`` must call every method.
    """

    def __init__(self, root: Path, ranks: Ranks) -> None:
        self.root = root
        self.damaged: list[str] = []
        """What ``newest`` found wrong, checkpoint by checkpoint."""
        self._ranks = ranks
        self._attempt: int | None = None
        self._writer: CheckpointWriter | None = None

    def begin(self, step: int, num_bytes: int = 0) -> CheckpointWriter:
        """A new temporary folder, for all ranks to write into.

        Args:
            step: of the checkpoint.
            num_bytes: that this rank is going to write.

        Raises:
            CheckpointError: there is no room, it cannot be made, or a rank does not see it.
        """
        [total] = self._ranks.add_up([num_bytes])
        folder = self._on_rank_0(lambda: self._claim(step, total))

        def see() -> None:
            if not folder.path.is_dir():
                raise CheckpointError(
                    f"{folder.path} was made by rank 0 and cannot be seen here; "
                    "run.dir must lie on a file system that all nodes share"
                )

        on_every_rank(self._ranks, see, os_error=CheckpointError)
        self._writer = CheckpointWriter(folder, self._ranks)
        return self._writer

    def newest(self, *, proven: bool = False) -> Path | None:
        """The newest checkpoint whose every byte is as it was written; None in a run without any.

        A damaged one is renamed ``.damaged``, with a warning that says which file is wrong and how,
        and the one before is tried.

        Args:
            proven: pass over those that are not.

        Raises:
            CheckpointError: there are checkpoints, and none of them is good; or one that might be
                the newest good one cannot be read, or is of a format that is not known here.
        """
        self._on_rank_0(self._tidy)
        candidates = proven_folders if proven else step_folders
        for folder in self._on_rank_0(lambda: candidates(self.root)):
            problems = verify(folder, self._ranks)
            if not problems:
                return folder
            damaged = self._on_rank_0(partial(_rename_as, folder, ".damaged"))
            told = _listed(f"{folder.name} is damaged, renamed {damaged.name}", problems)
            self.damaged.append(told)
            if self._ranks.rank == 0:
                _log.warning("checkpoint %s", told)
        damaged_names = self._on_rank_0(lambda: step_names(self.root, ".damaged"))
        if damaged_names:
            raise CheckpointError(
                _listed(f"{self.root} has no good checkpoint", self.damaged or damaged_names)
                + "\n  -> restore one from a backup, or start over in another run.dir"
            )
        return None

    def retain(self, keep: int | None, keep_every: int = 0) -> list[Path]:
        """Delete all but the ``keep`` newest checkpoints; returns what was deleted.

        What stays beside them, ``to_retire`` says.

        On rank 0, nothing on others; no collective. Deletes nothing unless the newest is what this
        process has just committed, whose bytes are thus known to be good.

        Raises:
            OSError: one cannot be deleted.
        """
        newest = step_folders(self.root)[:1]
        if keep is None or self._writer is None or newest != [self._writer.committed]:
            return []
        return delete(to_retire(self.root, keep, keep_every))

    def _on_rank_0(self, action: Callable[[], T]) -> T:
        return on_rank_0(self._ranks, action, os_error=CheckpointError)

    def _claim(self, step: int, num_bytes: int) -> CheckpointFolder:
        self.root.mkdir(parents=True, exist_ok=True)
        if self._attempt is None:
            self._attempt = next_attempt(self.root)
            self._tidy()
        name = str(StepName(self._attempt, step))
        final, temporary = self.root / name, self.root / f"{name}.tmp"
        if temporary.exists() or final.exists():
            raise CheckpointError(f"step {step} was already saved as {final}")
        self._refuse_without_room(num_bytes)
        folder = CheckpointFolder(temporary)
        folder.make()
        return folder

    def _refuse_without_room(self, num_bytes: int) -> None:
        """Before anything is written: a full disk may stop other things than a save."""
        free = shutil.disk_usage(self.root).free
        if num_bytes + SMALL_FILES_BYTES <= free:
            return
        sizes = {folder: size_of(folder) for folder in step_folders(self.root)[1:]}
        older = "".join(f"\n  rm -r {f}  # {size:,} bytes" for f, size in reversed(sizes.items()))
        raise CheckpointError(
            f"a checkpoint needs {num_bytes + SMALL_FILES_BYTES:,} bytes, {self.root} has {free:,} "
            "left: nothing was written  -> make room"
            + (f"; checkpoints that a newer one replaces, oldest first:{older}" if older else "")
        )

    def _tidy(self) -> None:
        """Finish or remove what a run that died left behind, half written or half deleted."""
        for name in step_names(self.root, ".tmp"):
            folder = self.root / name
            try:
                read_manifest(folder)
            except DamagedError:
                _delete(folder)
            else:  # died between COMMIT and the renaming
                rename(folder, folder.with_suffix(""))
        for name in step_names(self.root, ".deleted"):
            shutil.rmtree(self.root / name)


def to_retire(root: Path, keep: int, keep_every: int) -> list[Path]:
    """All checkpoints under ``root`` but the ``keep`` newest and the newest that is proven.

    And but those of steps that are multiples of ``keep_every``, where it is not 0.
    """
    folders = step_folders(root)
    proven = next(iter(proven_folders(root)), None)
    return [
        folder
        for folder in folders[keep:]
        if folder != proven and not (keep_every and parse_step(folder.name).step % keep_every == 0)
    ]


def delete(folders: list[Path]) -> list[Path]:
    """Delete checkpoints, such that a part of one is never taken for it; returns them."""
    for folder in folders:
        _delete(folder)
    return folders


def proven_folders(root: Path) -> list[Path]:
    """The checkpoints under ``root`` that are proven, newest first."""
    return [folder for folder in step_folders(root) if is_proven(folder)]


def is_proven(folder: Path) -> bool:
    """Whether a step after it had a sound loss, before it was committed."""
    try:
        return read_manifest(folder).info.get("proven", False) is True
    except (OSError, CheckpointError):
        return False


def size_of(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _delete(folder: Path) -> None:
    """Delete a folder such that a part of it can never be taken for a checkpoint."""
    shutil.rmtree(_rename_as(folder, ".deleted"))


def _rename_as(folder: Path, state: str) -> Path:
    renamed = free_name(folder, state)
    rename(folder, renamed)
    return renamed


def _listed(title: str, items: list[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {item}" for item in items)])

"""One checkpoint on its way from an empty folder to a commit; saving and importing both take it.

``CheckpointStore.begin`` makes folder and writer; the ranks write their shards; ``record``
and ``publish`` make the folder a checkpoint. Until then it bears a name that nothing takes for one.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triptych.checkpoints.layout import LATEST, CheckpointFolder, parse_step
from triptych.checkpoints.manifest import (
    CheckpointManifest,
    SavedFile,
    record_files,
    sync_folder,
    write_manifest,
    write_synced,
)
from triptych.data.hashed_files import HashedFile
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, on_every_rank, on_rank_0


class CheckpointWriter:
    """Records and commits what the ranks write into ``folder``.

    A file belongs to the rank in its name, ``rank_00003.bin``, which must have written it; any
    other file belongs to rank 0.
    """

    def __init__(self, folder: CheckpointFolder, ranks: Ranks) -> None:
        self.folder = folder
        """Temporary; the name changes with the commit."""
        self.committed: Path | None = None
        """The checkpoint, once it is one; known to rank 0."""
        self._ranks = ranks

    def record(self, known: Mapping[Path, HashedFile]) -> dict[str, SavedFile]:
        """What this rank wrote, by its hashes; it is on disk afterwards. No collective.

        Args:
            known: files that are hashed and on disk; all others are read back.

        Raises:
            OSError: it cannot be read back.
        """
        return record_files(self.folder.path, self._ranks.rank, known)

    def publish(self, files: Mapping[str, SavedFile], info: Mapping[str, Any]) -> Path:
        """Make what the ranks wrote a checkpoint; returns its final path. On rank 0, no collective.

        Args:
            files: what every rank has recorded.
            info: goes into the manifest as it is: plan hash, stage, layout. Plain JSON.
        """
        temporary = self.folder.path
        step = parse_step(temporary.name)
        write_manifest(
            self.folder, CheckpointManifest(step.step, step.attempt, dict(info), dict(files))
        )
        final = temporary.with_name(str(step))
        rename(temporary, final)
        hint = final.with_name(f"{LATEST}.tmp")
        write_synced(hint, f"{final.name}\n".encode())
        rename(hint, final.with_name(LATEST))
        self.committed = final
        return final

    def commit(self, info: Mapping[str, Any]) -> Path:
        """Record and publish, while all ranks wait. Every rank must call this.

        Raises:
            CheckpointError: on every rank, if any rank failed; the folder then stays temporary.
        """
        shares = on_every_rank(self._ranks, lambda: self.record({}), os_error=CheckpointError)
        files = {path: record for share in shares for path, record in sorted(share.items())}
        return on_rank_0(self._ranks, lambda: self.publish(files, info), os_error=CheckpointError)


def rename(old: Path, new: Path) -> None:
    """Rename; the new name is on disk afterwards."""
    os.replace(old, new)
    sync_folder(new.parent)

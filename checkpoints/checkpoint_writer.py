"""One checkpoint on its way from an empty folder to a commit; saving and importing both take it.

``CheckpointStore.begin`` makes folder and writer; the ranks write their shards; ``describe`` says
what they are of; ``commit`` makes the folder a checkpoint. Until then it bears a name that nothing
takes for one.
"""

import os
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
from triptych.checkpoints.model_file import write_model
from triptych.configs.compose import save_config
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Config
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, on_every_rank, on_rank_0


class CheckpointWriter:
    """Describes and commits what the ranks write into ``folder``.

    A file belongs to the rank in its name, ``rank_00003.bin``, which must have written it; any
    other file belongs to rank 0. Every rank must call every method.
    """

    def __init__(self, folder: CheckpointFolder, ranks: Ranks) -> None:
        self.folder = folder
        """Temporary; the name changes with the commit."""
        self.committed: Path | None = None
        """The checkpoint, once it is one."""
        self._ranks = ranks

    def describe(self, model: ModelConfig, config: Config | None = None) -> None:
        """Write what the weights are of.

        Args:
            model: of the weights.
            config: of the run that saves, if one does.

        Raises:
            CheckpointError: on every rank, if it cannot be written.
        """

        def describe() -> None:
            write_model(self.folder.model, model)
            if config is not None:
                save_config(config, self.folder.config)

        on_rank_0(self._ranks, describe, os_error=CheckpointError)

    def commit(self, info: dict[str, Any]) -> Path:
        """Make what the ranks wrote a checkpoint; returns its final path.

        Args:
            info: goes into the manifest as it is: plan hash, stage, layout. Plain JSON.

        Raises:
            CheckpointError: on every rank, if any rank failed; the folder then stays temporary.
        """
        files = self._record()
        step = parse_step(self.folder.path.name)
        manifest = CheckpointManifest(step=step.step, attempt=step.attempt, info=info, files=files)
        self.committed = on_rank_0(
            self._ranks, lambda: self._publish(manifest), os_error=CheckpointError
        )
        return self.committed

    def _record(self) -> dict[str, SavedFile]:
        """Hash every file, each by the rank that wrote it; all are on disk afterwards."""
        self._ranks.all_gather(None)  # no rank still writes
        shares = on_every_rank(
            self._ranks,
            lambda: record_files(self.folder.path, self._ranks.rank),
            os_error=CheckpointError,
        )
        return {path: record for share in shares for path, record in sorted(share.items())}

    def _publish(self, manifest: CheckpointManifest) -> Path:
        """On rank 0: the commit itself, and the hint to it."""
        temporary = self.folder.path
        write_manifest(self.folder, manifest)
        final = temporary.with_name(str(parse_step(temporary.name)))
        rename(temporary, final)
        hint = final.with_name(f"{LATEST}.tmp")
        write_synced(hint, f"{final.name}\n".encode())
        rename(hint, final.with_name(LATEST))
        return final


def rename(old: Path, new: Path) -> None:
    """Rename; the new name is on disk afterwards."""
    os.replace(old, new)
    sync_folder(new.parent)

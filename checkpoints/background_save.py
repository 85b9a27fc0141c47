"""Saves beside training: the ranks write and hash in threads of their own, one save at a time.

    begin    a folder, and in a thread of each rank: write, hash, put on disk
    poll     after each step. Once all ranks are done, and it is proven or waited for: in a thread
             of rank 0, commit and retire
    poll     once that is done, it is told; a failure of any rank is raised on all

What threads do here lets others run: writing, hashing and waiting for a disk hold no lock of
Python's. A thread ends with its process, however that ends, and opens no connection: collectives
are called by ``begin`` and ``poll`` only. Until somebody waits for it, a save rests ``RESTS`` times
as long as it computes: hashing at full speed takes the memory's bandwidth from the step beside it.
Waiting for a disk takes nothing.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol

from triptych.checkpoints.checkpoint_writer import CheckpointWriter
from triptych.checkpoints.layout import CheckpointFolder
from triptych.checkpoints.manifest import SavedFile
from triptych.checkpoints.store import CheckpointStore
from triptych.data.hashed_files import HashedFile
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, on_every_rank

RESTS = 3.0
"""Times the CPU-seconds that a save took: then the steps beside it take some .03 longer."""
_log = logging.getLogger(__name__)


class Savable(Protocol):
    """A rank's part of a checkpoint, as it is at one moment."""

    @property
    def num_bytes(self) -> int:
        """What it will take on disk, but for small files."""

    def write(
        self, folder: CheckpointFolder, go_on: Callable[[], None]
    ) -> Mapping[Path, HashedFile]:
        """Write it, calling ``go_on`` now and then, which may end it by an error.

        Returns those of its files that are on disk already, with what each is known by.
        """


class BackgroundSave:
    """The save in flight, if there is one. Every rank must call every method but ``close``."""

    def __init__(
        self, store: CheckpointStore, ranks: Ranks, keep: int | None, keep_every: int = 0
    ) -> None:
        """Begin with none; ``keep`` None keeps all, else as ``CheckpointStore.retain``."""
        self._store, self._ranks = store, ranks
        self._keep, self._keep_every = keep, keep_every
        self._executor = futures.ThreadPoolExecutor(1, thread_name_prefix="save")
        self._given_up, self._is_awaited = threading.Event(), threading.Event()
        self._computed_s = 0.0
        self._step = 0
        self._info: dict[str, Any] = {}
        self._writer: CheckpointWriter | None = None
        self._writing: futures.Future[Mapping[str, SavedFile]] | None = None
        self._written: dict[str, SavedFile] = {}
        self._publishing: futures.Future[Path | None] | None = None

    @property
    def step(self) -> int | None:
        """The step that is being saved, if any."""
        return self._step if self._writing or self._written or self._publishing else None

    @property
    def is_proven(self) -> bool:
        """Whether there is one, and a later step has shown that it is worth keeping."""
        return self.step is not None and bool(self._info["proven"])

    def begin(self, step: int, part: Savable, info: Mapping[str, Any]) -> None:
        """Begin to save ``part``, which stays as it is until ``poll`` has told of it.

        Raises:
            CheckpointError: on every rank: there is no room, or the folder cannot be made.
        """
        assert self.step is None, "one save at a time"
        self._step, self._info = step, {**info, "proven": False}
        with self._explained():
            writer = self._store.begin(step, num_bytes=part.num_bytes)

        self._is_awaited.clear()

        def write() -> Mapping[str, SavedFile]:
            self._computed_s = time.thread_time()
            known = part.write(writer.folder, self._go_on)
            self._go_on()
            return writer.record(known)

        self._writer, self._writing = writer, self._executor.submit(write)

    def poll(self, *, wait: bool = False, proven: bool = False) -> Path | None:
        """Go on with the save where all ranks are ready to; the checkpoint, once it is one.

        Args:
            wait: for the save, until it is committed.
            proven: whether a step after it has shown a sound loss, for the manifest to say.

        Raises:
            CheckpointError: on every rank alike, if any failed; names each of them.
        """
        self._info["proven"] = self._info["proven"] or proven
        with self._explained():
            return self._advance(wait=wait)

    def _advance(self, *, wait: bool) -> Path | None:
        if self._writing is not None:
            shares = self._results(self._writing, wait=wait)
            if shares is None:
                return None
            self._written = {n: file for share in shares for n, file in sorted(share.items())}
            self._writing = None
        if self._written and (wait or self._info["proven"]):
            files, self._written = self._written, {}
            self._publishing = self._executor.submit(self._publish, files, dict(self._info))
        if self._publishing is not None:
            paths: list[Path | None] | None = self._results(self._publishing, wait=wait)
            if paths is not None:
                self._publishing = None
                return paths[0]
        return None

    def close(self) -> None:
        """Give up what is in flight; no collective. The folder is removed at the next start."""
        self._given_up.set()
        self._is_awaited.set()
        self._executor.shutdown()

    def _results(self, future: futures.Future[Any], *, wait: bool) -> list[Any] | None:
        """What came of it on every rank; None while a rank is busy and none has failed."""
        if wait:
            self._is_awaited.set()
            futures.wait([future])
        is_done = future.done()
        has_failed = is_done and future.exception() is not None
        num_busy, num_failed = self._ranks.add_up([not is_done, has_failed])
        if num_busy and not num_failed:
            return None
        return on_every_rank(
            self._ranks, lambda: future.result() if is_done else None, os_error=CheckpointError
        )

    def _publish(self, files: dict[str, SavedFile], info: dict[str, Any]) -> Path | None:
        """On rank 0: commit, and retire what is older."""
        if self._ranks.rank != 0:
            return None
        assert self._writer is not None
        final = self._writer.publish(files, info)
        try:
            self._store.retain(self._keep, self._keep_every)
        except OSError as error:
            _log.warning("%s is saved; an older checkpoint could not be deleted: %s", final, error)
        return final

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(
                f"step {self._step} could not be saved in {self._store.root}:\n{error}\n"
                "  -> what was saved before is as it was; mend the cause and type the command "
                "again: the run resumes"
            ) from error

    def _go_on(self) -> None:
        """Between two blocks: rest ``RESTS`` times as long as the last one took to compute."""
        self._is_awaited.wait(RESTS * (time.thread_time() - self._computed_s))
        self._computed_s = time.thread_time()
        if self._given_up.is_set():
            raise CheckpointError(f"the save of step {self._step} was given up, as the run ended")

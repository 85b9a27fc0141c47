"""One run at a time in a ``run.dir``: two would take each other's temporary files for leftovers."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from triptych.data.make_once import NO_LOCKS_HERE
from triptych.errors import ConfigError
from triptych.parallel.agree import Ranks, on_rank_0

_log = logging.getLogger(__name__)

NAME = ".lock"


@contextlib.contextmanager
def lock_run_dir(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other runs out of ``run_dir`` for as long as this lasts. Every rank must call this.

    Rank 0 holds ``run_dir/.lock`` by flock, which ends with its process, however that ends. On the
    way out the file is removed, and so are the folders made for it that stayed empty.

    Raises:
        ConfigError: on every rank alike, with no trace left: another run has the lock, which the
            message names, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            try:
                stack.enter_context(_locked(run_dir))
            except BlockingIOError as held:
                raise ConfigError(
                    f"run.dir={run_dir} is in use by {held}"
                    "  -> wait until that run ends, or take another run.dir"
                ) from held
            except OSError as error:
                raise ConfigError(
                    f"run.dir={run_dir} cannot be written: {error}"
                    "  -> run.dir=FOLDER, one with room where you may write"
                ) from error

        on_rank_0(ranks, enter, os_error=ConfigError)
        yield


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """The lock of one process; ``BlockingIOError`` says who has it."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    path = run_dir / NAME
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with _acquire(path) as file:
            file.truncate(0)
            file.write(_this_process())
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # not empty: the run has written there
            for folder in made:
                folder.rmdir()


def _acquire(path: Path) -> TextIO:
    """The file, open and locked."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise BlockingIOError(file.read() or "another run") from None
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            _log.warning("%s: %s; see to it that no other run writes there", path, error.strerror)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                # a forked writer of checkpoints would keep the lock of a rank that was killed
                os.register_at_fork(after_in_child=file.close)
                return file
        file.close()  # who had it has just removed it


def _this_process() -> str:
    """Who has the lock, for whoever finds it taken."""
    job = os.environ.get("SLURM_JOB_ID")
    return (
        f"process {os.getpid()} on {socket.gethostname()}"
        + (f", Slurm job {job}" if job else "")
        + f", since {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"
    )

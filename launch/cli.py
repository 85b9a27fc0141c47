"""What all commands share: errors become a message and an exit code, not a traceback."""

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence

from triptych.errors import CheckpointError, ConfigError, TriptychError
from triptych.train.console import console

SPEAKER_FIRST_S = 3.0
"""How long the silent ranks wait, so that torchrun does not stop rank 0 before it has spoken."""

NO_ROOM = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT),
    "  -> make room and type the command again: training resumes from its newest checkpoint",
)
"""Errors of a full disk, which often name no file -> what to do."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command with the words of the command line.

    Exits with 1 on an error that a person can mend.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        with console(rank):
            main(sys.argv[1:])
    except (ConfigError, CheckpointError) as error:  # raised on all ranks alike
        if rank != 0:
            time.sleep(SPEAKER_FIRST_S)
            sys.exit(1)
        sys.exit(f"{type(error).__name__}: {error}")
    except TriptychError as error:
        sys.exit(f"{_where(rank)}{type(error).__name__}: {error}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        sys.exit(f"{_where(rank)}stopped: what read the output, as `head` does, has gone")
    except OSError as error:
        if error.filename is None and error.errno not in NO_ROOM:
            raise
        sys.exit(
            f"{_where(rank)}{type(error).__name__}: {error}{NO_ROOM.get(error.errno or 0, '')}"
        )


def _where(rank: int) -> str:
    """Which rank speaks, where there are several."""
    return f"[rank {rank}] " if "RANK" in os.environ else ""

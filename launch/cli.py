"""What all commands share: errors become a message and an exit code, not a traceback."""

import os
import sys
import time
from collections.abc import Callable, Sequence

from triptych.errors import CheckpointError, ConfigError, TriptychError

SPEAKER_FIRST_S = 3.0
"""How long the silent ranks wait, so that torchrun does not stop rank 0 before it has spoken."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command with the words of the command line.

    Exits with 1 on an error that a person can mend.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        main(sys.argv[1:])
    except (ConfigError, CheckpointError) as error:  # raised on all ranks alike
        if rank != 0:
            time.sleep(SPEAKER_FIRST_S)
            sys.exit(1)
        sys.exit(f"{type(error).__name__}: {error}")
    except TriptychError as error:
        where = f"[rank {rank}] " if "RANK" in os.environ else ""
        sys.exit(f"{where}{type(error).__name__}: {error}")

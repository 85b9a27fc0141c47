"""What all commands share: an error is told once, as the last thing on the screen."""

import argparse
import contextlib
import errno
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from triptych.errors import CheckpointError, ConfigError, CrashLoopError, TriptychError
from triptych.train.console import console
from triptych.train.failures import lost_a_peer
from triptych.train.last_words import speaks_first

SPEAKER_FIRST_S = 3.0
"""How long the other ranks wait, so that torchrun stops none before it has spoken."""

NO_ROOM = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT),
    "  -> make room and type the command again: training resumes from its newest checkpoint",
)
"""Errors of a full disk, which often name no file -> what to do."""

NO_USE = 3
"""The exit code that asks launchers not to start again."""
INTERRUPTED = "interrupted  -> type the command again: training resumes from its newest checkpoint"


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command with the words of the command line.

    Exits with 1 on an error, with 3 where it is no use to start again, and with 130 on Ctrl-C. An
    error that a person can mend is its message; any other is a mistake of ours, with its traceback.
    """
    signal.signal(signal.SIGINT, _interrupt_once)
    rank = int(os.environ.get("RANK", "0"))
    try:
        with console(rank):
            main(sys.argv[1:])
    except KeyboardInterrupt:
        _leave(INTERRUPTED, status=130)
    except (ConfigError, CheckpointError) as error:  # raised on all ranks alike
        _leave(f"{type(error).__name__}: {error}")
    except CrashLoopError as error:
        _leave(f"{type(error).__name__}: {error}", status=NO_USE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        _leave(f"{_where(rank)}stopped: what read the output, as `head` does, has gone")
    except Exception as error:
        message = f"{_where(rank)}{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            _leave(f"{message}{NO_ROOM[error.errno]}")
        if isinstance(error, TriptychError) or (isinstance(error, OSError) and error.filename):
            _leave(message)
        _leave(message, before=traceback.format_exc(), is_cause=not lost_a_peer(error))


@contextlib.contextmanager
def long_import() -> Iterator[None]:
    """Import torch, and what takes it along, in this.

    All that it makes, half a million objects, stays: to look through them for garbage, meanwhile
    and ever after, takes a tenth of the time to the first step.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def at_least_one(text: str) -> int:
    """The type of an argument that counts something."""
    return _whole_number(text, 1)


def at_least_zero(text: str) -> int:
    """The type of an argument that counts something that may be left out."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from {least} on")
    return int(text)


def _leave(message: str, *, before: str = "", status: int = 1, is_cause: bool = True) -> NoReturn:
    """Exit. Of the ranks of a node, the first to come here is heard, the others wait for it."""
    if speaks_first(message, is_cause=is_cause):
        print(f"{before}{message}", file=sys.stderr, flush=True)
    else:
        time.sleep(SPEAKER_FIRST_S)
    sys.exit(status)


def _interrupt_once(_signal: int, _frame: FrameType | None) -> NoReturn:
    """As Python does, and once: the terminal interrupts every rank, then torchrun does again."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _where(rank: int) -> str:
    """Which rank speaks, where there are several."""
    return f"[rank {rank}] " if "RANK" in os.environ else ""

"""The one way to the terminal: ``logging``, each line with its time.

    11-25 14:03:22 stage2 step 5/20 | loss 5.7871, norm 2.91 | ...
    11-25 14:03:23 [rank 3] warning from torch.distributed: ...

Rank 0 tells what goes on, the other ranks only what they warn of. Warnings of libraries, by
``logging`` or by ``warnings``, come the same way; what C++ writes by itself does not.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

OURS = logging.getLogger(__name__.partition(".")[0])
"""Above the loggers of all our modules."""
TIME = "%m-%d %H:%M:%S"
COLUMNS = 120 - len("11-25 14:03:22 ")
"""What a line may hold beside its time to fit a terminal."""


def say(text: str) -> None:
    """Tell a person what goes on, at once: a silent log looks like a hung job. Rank 0 is heard."""
    OURS.info(text)


@contextlib.contextmanager
def console(rank: int) -> Iterator[None]:
    """Let this rank speak for as long as this lasts: to stdout, warnings to stderr."""
    handler, root = _Terminal(rank), logging.getLogger()
    before = OURS.level
    OURS.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        OURS.setLevel(before)


def take_over_libraries() -> None:
    """Let libraries that brought a way to the terminal of their own use ours; after their import.

    As torch, transformers and DeepSpeed do. Their levels and log files stay.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for handler in list(logger.handlers):
            if type(handler) is logging.StreamHandler:  # no subclass: that may write to a file
                logger.removeHandler(handler)
                logger.propagate = True


def duration(seconds: float) -> str:
    """As "3d 04h", "2h 05m" or "1m 07s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    days, hours_rest = divmod(hours, 24)
    if days:
        return f"{days}d {hours_rest:02d}h"
    return f"{hours}h {minutes_rest:02d}m" if hours else f"{minutes}m {rest:02d}s"


class _Terminal(logging.Handler):
    """Writes our lines, and the warnings of all others; every line of a message under its time."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._speaker = f"[rank {rank}] " if rank else ""
        self.addFilter(lambda record: _is_ours(record) or record.levelno >= logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Write it; an error, as of a pipe that nobody reads, is raised to who speaks."""
        warns = record.levelno >= logging.WARNING
        stream = sys.stderr if warns else sys.stdout  # as they are now: they may be redirected
        source = "" if _is_ours(record) else f" from {record.name}"
        kind = f"{record.levelname.lower()}{source}: " if warns else ""
        now = time.strftime(TIME, time.localtime(record.created))
        lines = f"{kind}{self.format(record).rstrip()}".split("\n")
        stream.write("".join(f"{now} {self._speaker}{line}\n" for line in lines))
        stream.flush()


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] == OURS.name

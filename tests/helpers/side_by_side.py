"""Run the tests in pytest processes side by side; for make test, test-full and test-fast.

    python tests/helpers/side_by_side.py "not slow"     # a mark expression; none: every test
    python tests/helpers/side_by_side.py --fast         # only those that start no other process

Ranks that wait for each other leave most of two cores idle, single-process tests one of them. The
first process reports as it goes; the reports of the others follow when all have ended, and the
closing line of each, with its counts, once more at the end. What needs a machine without other work
runs last, alone, where every test is asked for.
"""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
RUN_FOLDERS = ("checkpoints", "configs", "data", "launch", "project", "train")
"""Of whole runs, and what belongs to them; the other folders are those of the engine."""
FAST = ("not slow", "not distributed", "not torchrun", "not slurm")
FIRST_FAST_FOLDERS = ("checkpoints", "configs", "costs", "launch", "train")
"""Those whose fast tests take about as long as all others."""
FIRST_ALONE_FOLDERS = ("launch",)
"""Those whose tests without a pool of ranks take about as long as all others."""


class Session(NamedTuple):
    """The tests of one pytest process."""

    title: str
    marks: Sequence[str]
    folders: Sequence[Path]


class Ended(NamedTuple):
    """How a pytest process ended."""

    closing: str
    """Its last line, with its counts."""
    code: int


def main(arguments: Sequence[str]) -> int:
    """Run all to their end, and show how each closed; returns 0 where every test passed."""
    at_once = fast_sessions() if "--fast" in arguments else sessions([*arguments, "not idle"])
    ended = run(at_once)
    if not arguments and all(each.code != pytest.ExitCode.INTERRUPTED for each in ended):
        ended += run([Session("tests that need idle cores, alone", ["idle"], [TESTS])])
    print("\n--- all", *(each.closing for each in ended), sep="\n")
    return next((each.code for each in ended if each.code != 0), 0)


def run(at_once: Sequence[Session]) -> list[Ended]:
    """Run them at the same time; show the first as it goes, and the others when all have ended."""
    first, *others = at_once
    with ExitStack() as stack:
        reports = [stack.enter_context(tempfile.TemporaryFile()) for _ in others]
        processes = [start(*each) for each in zip(others, reports, strict=True)]
        shown = start(first, subprocess.PIPE)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them
        assert shown.stdout is not None
        closing = [show(shown.stdout)]
        codes = [process.wait() for process in (shown, *processes)]
        for session, report in zip(others, reports, strict=True):
            print(f"\n--- {session.title}", flush=True)
            report.seek(0)
            closing.append(show(report))
        signal.signal(signal.SIGINT, before)
    return [Ended(*each) for each in zip(closing, codes, strict=True)]


def sessions(marks: Sequence[str]) -> list[Session]:
    """Of all tests that have these marks; that of the runs takes longest, and is shown."""
    distributed, alone = [*marks, "distributed"], [*marks, "not distributed"]
    runs, engine = split(RUN_FOLDERS)
    first, others = split(FIRST_ALONE_FOLDERS)
    return [
        Session("whole runs on a pool of ranks", distributed, runs),
        Session("the engine on a pool of ranks", distributed, engine),
        Session("commands, without a pool of ranks", alone, first),
        Session("all else that needs no pool of ranks", alone, others),
    ]


def fast_sessions() -> list[Session]:
    """Of the tests that start no other process, in two halves."""
    first, others = split(FIRST_FAST_FOLDERS)
    names = ", ".join(folder.name for folder in others)
    return [Session(", ".join(FIRST_FAST_FOLDERS), FAST, first), Session(names, FAST, others)]


def split(names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """The folders of tests of these names, and all others."""
    folders = sorted(path for path in TESTS.iterdir() if any(path.glob("test_*.py")))
    named = [folder for folder in folders if folder.name in names]
    return named, [folder for folder in folders if folder.name not in names]


def start(session: Session, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """A pytest of the tests in its folders that have all its marks."""
    marks = " and ".join(session.marks)
    command = [sys.executable, "-m", "pytest", "-m", marks, *map(str, session.folders)]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def show(output: IO[bytes]) -> str:
    """Pass it on as it comes; returns its last line, which has the counts."""
    shown = b""
    while chunk := output.read1():  # type: ignore[attr-defined]  # of buffered ones, as these are
        shown += chunk
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
    return shown.decode(errors="replace").rstrip().rpartition("\n")[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run the tests in three pytest processes side by side; for make test and make test-full.

    python tests/helpers/side_by_side.py "not slow"     # a mark expression; none: every test

Ranks that wait for each other leave most of two cores idle, single-process tests one of them. The
first process reports as it goes; the reports of the others follow when all have ended, and the
closing line of each, with its counts, once more at the end.
"""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

TESTS = Path(__file__).parents[1]
RUN_FOLDERS = ("checkpoints", "configs", "data", "launch", "project", "train")
"""Of whole runs, and what belongs to them; the other folders are those of the engine."""


def main(marks: Sequence[str]) -> int:
    """Run all to their end, and show how each closed; returns 0 where every test passed."""
    folders = sorted(path.name for path in TESTS.iterdir() if any(path.glob("test_*.py")))
    runs = [TESTS / name for name in folders if name in RUN_FOLDERS]
    engine = [TESTS / name for name in folders if name not in RUN_FOLDERS]
    with tempfile.TemporaryFile() as engine_report, tempfile.TemporaryFile() as single_report:
        single = start([*marks, "not distributed"], [TESTS], single_report)
        on_engine = start([*marks, "distributed"], engine, engine_report)
        on_runs = start([*marks, "distributed"], runs, subprocess.PIPE)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: each ends by itself
        assert on_runs.stdout is not None
        closing = [show(on_runs.stdout)]
        codes = [process.wait() for process in (on_runs, on_engine, single)]
        for title, report in {
            "the engine on a pool of ranks": engine_report,
            "all tests that need no pool of ranks": single_report,
        }.items():
            print(f"\n--- {title}", flush=True)
            report.seek(0)
            closing.append(show(report))
    print("\n--- all", *closing, sep="\n")
    return next((code for code in codes if code != 0), 0)


def start(
    marks: Sequence[str], folders: Sequence[Path], output: int | IO[bytes]
) -> subprocess.Popen[bytes]:
    """A pytest of the tests in some folders that have all these marks."""
    command = [sys.executable, "-m", "pytest", "-m", " and ".join(marks), *map(str, folders)]
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

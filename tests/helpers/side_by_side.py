"""Run the tests in two pytest processes side by side; for make test and make test-full.

    python tests/helpers/side_by_side.py "not slow"     # a mark expression; none: every test

Cases on the pool of ranks run in one, with its report as it comes; all others in the other, whose
report follows when both have ended. Single-process tests, and processes that start, leave one of
two cores idle; ranks that wait for each other leave some of both.
"""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO


def main(marks: Sequence[str]) -> int:
    """Run both to their end, and show how each closed; returns 0 where every test passed."""
    with tempfile.TemporaryFile() as report:
        others = start([*marks, "not distributed"], report)
        on_ranks = start([*marks, "distributed"], subprocess.PIPE)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: each ends by itself
        assert on_ranks.stdout is not None
        closing = [show(on_ranks.stdout)]
        codes = [on_ranks.wait(), others.wait()]
        print("\n--- all tests that need no pool of ranks", flush=True)
        report.seek(0)
        closing.append(show(report))
    print("\n--- both", *closing, sep="\n")
    return next((code for code in codes if code != 0), 0)


def start(marks: Sequence[str], output: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """A pytest of the tests that have all these marks."""
    command = [sys.executable, "-m", "pytest", "-m", " and ".join(marks)]
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

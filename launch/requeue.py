"""Says whether a job that has ended shall be started again; for job scripts, as pretrain.sbatch.

    python -m triptych.launch.requeue SINCE STATUS stage=2 run.dir=...

prints "again", "done" or "refused". SINCE is when the job began (``date +%s``), STATUS how training
ended, the rest its command line. It imports no torch.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from triptych.configs.compose import load_config
from triptych.launch.cli import run
from triptych.train.events import read_events
from triptych.train.restarts import ENDS_OF_ITSELF


def verdict(events: Sequence[Mapping[str, Any]], since: float, *, failed: bool) -> str:
    """What comes after a job's end.

    How often it starts again in vain, ``train/crash_loop.py`` says.

    Args:
        events: of the run, of all its starts.
        since: Unix time of the job's beginning; what was before does not count.
        failed: the command has not ended with 0.

    Returns:
        "again": it was asked to, or failed while it trained. "done": it is finished, gave up, or a
        person stopped it. "refused": it failed before it trained, and would be refused again.
    """
    told = [event for event in events if event["time"] >= since]
    ends = [event for event in told if event["what"] in (*ENDS_OF_ITSELF, "gave_up")]
    if ends:
        return "again" if ends[-1].get("requeue", False) else "done"
    if not failed:
        return "done"
    return "again" if any(event["what"] == "started" for event in told) else "refused"


def main(argv: Sequence[str]) -> None:
    """Print it."""
    since, status, *words = argv
    events = read_events(Path(load_config(words).run.dir))
    print(verdict(events, float(since), failed=status != "0"))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    run(main)

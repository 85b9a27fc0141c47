"""What kills cost: from kill -9 of a rank to its next optimizer step, and the time that counts.

    python benchmarks/kills.py --folder /tmp [--kills 4]

Two ranks under torchrun, which restarts them. One is killed at as many places between two saves as
there are kills, evenly spread: so on average half of a save interval is lost.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.benchmarks.table import Row, finish, spread
from triptych.train.events import read_events
from triptych.train.json_lines import last_line, read_lines
from triptych.train.records import METRICS
from triptych.train.restarts import effective_share, read_starts

ROOT = Path(__file__).parents[1]
COMMAND = "python benchmarks/kills.py --folder /tmp"
EVERY, BETWEEN = 16, 64
"""Steps from save to save, and about as many from kill to kill."""
MOST_S = 10.0


def main(argv: Sequence[str]) -> None:
    """Train, kill, and print a row for each claim."""
    parser = parser_with_folder(__doc__ or "")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("words", nargs="*", help="more of the run's configuration")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = measure(Path(name), options.kills, options.words)
    finish(found)


def measure(folder: Path, num_kills: int, words: Sequence[str]) -> list[Row]:
    """Run it to its end; rows of times, lost steps and effective time."""
    run_dir = folder / "run"
    launcher = f"torch.distributed.run --standalone --nproc-per-node=2 --max-restarts={num_kills}"
    agent = subprocess.Popen(
        [
            *(sys.executable, "-m", *launcher.split(), str(ROOT / "launch" / "pretrain.py")),
            *(f"run.dir={run_dir}", f"data.root={folder}/data", f"run.checkpoint_every={EVERY}"),
            f"train.num_steps={(num_kills + 1) * BETWEEN}",
            *("train.seq_len=256", "stage.token_budget=1000000000", *words),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
    )
    kills_s = []
    for kill in range(num_kills):
        place = (kill + 1) * BETWEEN + round((kill + 0.5) / num_kills * EVERY)
        while (last := last_line(run_dir / METRICS)) is None or last["step"] < place:
            assert agent.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        ranks = psutil.Process(agent.pid).children()
        kills_s.append(time.time())
        ranks[-1].kill()
        while len(_events(run_dir, "first_step")) < kill + 2:
            assert agent.poll() is None, "it was not restarted"
            time.sleep(0.05)
    assert agent.wait() == 0, "it did not come to its end"
    return _rows(run_dir, kills_s)


def _rows(run_dir: Path, kills_s: Sequence[float]) -> list[Row]:
    events = read_events(run_dir)
    starts = read_starts(events)
    firsts = [event["time"] for event in _events(run_dir, "first_step")][1:]
    restarts_s = [first - kill for first, kill in zip(firsts, kills_s, strict=True)]
    imports_s = [event["start_up_s"]["imports"] for event in _events(run_dir, "started")][1:]
    beyond_s = [all_s - part for all_s, part in zip(restarts_s, imports_s, strict=True)]
    lost = [before.reached - after.step for before, after in pairwise(starts)]
    steps_s = [line["step_time_s"] for line in read_lines(run_dir / METRICS)]
    assert len(steps_s) == starts[-1].reached, "a step is missing, or is there twice"
    share = effective_share(starts, starts[-1].ended, starts[-1].reached)
    useful_s = share * (starts[-1].ended - starts[0].begun)
    lost_s = EVERY / 2 * statistics.median(steps_s)
    start_s = (starts[0].trains_since or 0.0) - starts[0].begun
    bound = useful_s / (useful_s + start_s + sum(second + lost_s for second in restarts_s))
    return [
        Row(
            "kill -9 of one of 2 ranks to the first new optimizer step, imports not counted",
            f"{spread(beyond_s, 1)} s, of {spread(restarts_s, 1)} s",
            f"<= {MOST_S:.0f} s",
            max(beyond_s) <= MOST_S,
            COMMAND,
        ),
        Row(
            f"steps lost by a kill, of {EVERY} from save to save",
            ", ".join(map(str, lost)),
            f"<= {EVERY}, and 2 until the commit",
            max(lost) <= EVERY + 2,
            COMMAND,
        ),
        Row(
            f"effective time with {len(lost)} kills, of what save interval and restarts allow",
            f"{share:.1%} of {bound:.1%}: {share / bound:.1%}",
            ">= 97 %",
            share >= 0.97 * bound,
            COMMAND,
        ),
    ]


def _events(run_dir: Path, what: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["what"] == what]


if __name__ == "__main__":
    main(sys.argv[1:])

"""Ends a run that is started again and again and gets nowhere, and says what it suspects.

Three starts from the same step, none of which lasted to a later checkpoint, are enough. The run
then refuses to start, until a person has removed ``run.dir/crash_loop``, which says why: launchers
that start again whatever fails would never tell.
"""

from collections.abc import Sequence
from pathlib import Path

from triptych.configs.schema import Config
from triptych.errors import CrashLoopError
from triptych.parallel.agree import on_rank_0
from triptych.parallel.mesh import Mesh
from triptych.train.data import Mixture
from triptych.train.events import read_events, record_event
from triptych.train.restarts import PastStart, starts_without_progress
from triptych.train.state import TrainState

CRASH_LOOP = "crash_loop"
"""The file in ``run.dir``."""
NUM_STARTS = 3
MOST_NAMES = 8


def refuse_crash_loop(config: Config, mesh: Mesh, data: Mixture, state: TrainState) -> None:
    """Refuse a start that others before it have shown to lead nowhere. Every rank must call this.

    A checkpoint that was named (``resume=FOLDER``) is a person's choice, and is not refused.

    Raises:
        CrashLoopError: on every rank.
    """
    run_dir = Path(config.run.dir)

    def check() -> None:
        path = run_dir / CRASH_LOOP
        if not path.exists():
            stuck = starts_without_progress(read_events(run_dir), state.step)
            if len(stuck) < NUM_STARTS:
                return
            told = _told(stuck, suspected_batch(config, data, state, stuck))
            path.write_text(told)
            record_event(run_dir, "gave_up", step=state.step, reason=told)
        why = path.read_text(errors="replace")
        raise CrashLoopError(
            f"{why}\n  -> mend the cause, then rm {path} and type the command again"
        )

    if config.resume == "auto":
        on_rank_0(mesh.world, check, os_error=CrashLoopError)


def suspected_batch(
    config: Config, data: Mixture, state: TrainState, stuck: Sequence[PastStart]
) -> str:
    """Packs and samples of the step in which all ended; empty where they ended in different ones.

    Where a run went back past the data of some steps, they lie between. The pack numbers are the
    ledger's.
    """
    ends = {start.batches_on for start in stuck}
    if len(ends) > 1 or min(ends) < 0:
        return ""
    packs_per_step = config.train.global_batch_size
    cursor = state.cursor
    for _ in range(ends.pop()):
        _, cursor = data.plan.next_packs(cursor, packs_per_step)
    packs, _ = data.plan.next_packs(cursor, packs_per_step)
    if not packs:  # they got to the end of the data
        return ""
    samples = [f"{data.plan.sources[s].name} {i}" for pack in packs for s, i in pack.samples]
    return (
        f"packs {packs[0].number} to {packs[-1].number}, samples {', '.join(samples[:MOST_NAMES])}"
        + (f" and {len(samples) - MOST_NAMES} more" if len(samples) > MOST_NAMES else "")
    )


def _told(stuck: Sequence[PastStart], batch: str) -> str:
    reached = [start.reached for start in stuck]
    lines = [
        f"the last {len(stuck)} starts went on from step {stuck[0].step} and got no further "
        f"checkpoint; the last steps that they finished: {', '.join(map(str, reached))}"
    ]
    hosts = set.intersection(*(set(start.suspects) for start in stuck))
    if hosts:
        lines.append(f"  suspected: host {', '.join(sorted(hosts))}, where each of them failed")
    if batch:
        lines.append(f"  suspected: the batch of step {reached[0] + 1}: {batch}")
    if not hosts and not batch:
        lines.append(
            "  they failed in different steps and not on one host: rather the memory, a "
            "file system, or less time than from one checkpoint to the next"
        )
    return "\n".join(lines)

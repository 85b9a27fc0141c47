"""How many samples may be unreadable before a run stops."""

from collections import defaultdict
from pathlib import Path

from triptych.configs.schema import Config
from triptych.errors import TrainingError
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.json_lines import read_lines
from triptych.train.records import QUARANTINE
from triptych.train.state import TrainState
from triptych.train.stop import StopReason

LEAST_SAMPLES = 10_000
"""The share is one of at least so many, or a short run would end by its first bad sample."""


class UnreadableBudget(Hook):
    """Asks for the end, as an error, once too much could not be read. On every rank.

    What it decides by is counted over all ranks and saved in checkpoints, so all ranks ask after
    the same step, also in a run that resumes.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._reason: StopReason | None = None

    def on_start(self, state: TrainState) -> None:
        """Refuse to go on where a run before stopped for it."""
        if spent := self._spent(state):
            raise TrainingError(out_of_budget(spent, self._config, state))

    def after_step(self, event: StepEvent) -> StopReason | None:
        """Ask, where the budget is used up."""
        spent = self._spent(event.state)
        if spent and self._reason is None:  # and it stays so, should the last step be a good one
            self._reason = StopReason(spent, is_error=True)
        return self._reason

    def _spent(self, state: TrainState) -> str:
        """What is above its bound; empty where nothing is."""
        data, bad, row = self._config.data, state.num_unreadable, state.unreadable_in_a_row
        if row >= data.max_unreadable_in_a_row:
            return (
                f"{row} samples in a row could not be read, all of the last steps that have media; "
                f"data.max_unreadable_in_a_row={data.max_unreadable_in_a_row}"
            )
        if bad > data.max_unreadable * max(state.consumed_samples, LEAST_SAMPLES):
            return (
                f"{bad:,} of {state.consumed_samples:,} samples could not be read, more than "
                f"data.max_unreadable={data.max_unreadable:g} of them "
                f"(of at least {LEAST_SAMPLES:,})"
            )
        return ""


def out_of_budget(spent: str, config: Config, state: TrainState) -> str:
    """The message: what is used up, a table by source and cause, and what to do."""
    folder = Path(config.run.dir) / QUARANTINE
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    lines = [line for file in folder.glob("dp_*.jsonl") for line in read_lines(file)]
    for line in sorted(lines, key=lambda line: (line["step"], line["source"], line["index"])):
        key = (line.get("name", f"source {line['source']}"), line.get("cause", "unknown"))
        found[key].append(f"step {line['step']}: {line['reason']}")
    rows = sorted(found.items(), key=lambda row: -len(row[1]))
    table = [f"  {len(told):>7,}  {name}: {cause}; {told[0]}" for (name, cause), told in rows]
    return "\n".join(
        [
            f"step {state.step}: {spent}",
            *table,
            f"  -> {folder} names all of them; launch/prepare.py verify DATASET tells which files "
            "to copy again. To go on without these samples, raise the bound and type the command "
            "again: training resumes",
        ]
    )

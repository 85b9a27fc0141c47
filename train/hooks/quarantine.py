"""The samples whose media could not be read, with the reason."""

from collections.abc import Sequence
from pathlib import Path

from triptych.parallel.mesh import Mesh
from triptych.train.console import say
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.json_lines import JsonLines
from triptych.train.records import QUARANTINE


class Quarantine(Hook):
    """Writes ``quarantine/dp_00000.jsonl`` and so on, one file per dp rank, on its reading rank.

    A file is made by the first bad sample. Rank 0, which reads, tells of the first step with any.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, sources: Sequence[str]) -> None:
        """Makes no file yet.

        Args:
            run_dir: of the run.
            mesh: of this rank.
            sources: names, as the plan numbers them.
        """
        self._sources = sources
        self._folder = run_dir / QUARANTINE
        self._lines = JsonLines(self._folder / f"dp_{mesh.dp_rank:05d}.jsonl")
        self._told = False

    def after_step(self, event: StepEvent) -> None:
        """Append the step's unreadable samples."""
        number = event.result.totals.num_unreadable
        if number and not self._told:
            say(
                f"samples that cannot be read are left out of the loss, {number} in this step; "
                f"{self._folder} names them and says why, and metrics.jsonl counts them",
            )
            self._told = True
        for sample in event.step.unreadable:
            batch = event.step.microbatches[sample.microbatch]
            source, index = batch.sample_ids[sample.segment]
            self._lines.write(
                {
                    "step": event.state.step,
                    "source": source,
                    "index": index,
                    "name": self._sources[source],
                    "shard": sample.shard,
                    "offset": sample.offset,
                    "cause": sample.cause.value,
                    "reason": sample.reason,
                }
            )

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

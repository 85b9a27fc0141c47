"""Which packs and samples a data-parallel rank trained on, step by step."""

from pathlib import Path

from triptych.parallel.mesh import Mesh
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.json_lines import JsonLines

LEDGER = "ledger"
"""The folder in ``run.dir``."""


class Ledger(Hook):
    """Writes ``ledger/dp_00000.jsonl`` and so on, one file per dp rank, on its reading rank.

    A file each, as appends of many nodes to one file on NFS can be lost.
    """

    def __init__(self, run_dir: Path, mesh: Mesh) -> None:
        self._lines = JsonLines(run_dir / LEDGER / f"dp_{mesh.dp_rank:05d}.jsonl")

    def after_step(self, event: StepEvent) -> None:
        """Append the step's packs, by number, and its samples, as [source, index]."""
        step = event.step
        samples = [sample for batch in step.microbatches for sample in batch.sample_ids]
        self._lines.write({"step": event.state.step, "packs": list(step.packs), "samples": samples})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

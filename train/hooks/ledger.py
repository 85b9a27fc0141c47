"""Which packs and samples a data-parallel rank trained on, step by step."""

from itertools import chain
from pathlib import Path
from typing import Any

from triptych.parallel.mesh import Mesh
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.json_lines import JsonLines, read_lines

LEDGER = "ledger"
"""The folder in ``run.dir``."""


class Ledger(Hook):
    """Writes ``ledger/dp_00000.jsonl`` and so on, one file per dp rank, on its reading rank.

    A file each, as appends of many nodes to one file on NFS can be lost.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, passed_over: dict[str, Any] | None) -> None:
        """Begin with what was passed over just before, ``trained_after``, if anything was."""
        self._lines = JsonLines(run_dir / LEDGER / f"dp_{mesh.dp_rank:05d}.jsonl")
        self._passed_over = {"passed_over": passed_over} if passed_over else {}

    def after_step(self, event: StepEvent) -> None:
        """Append the step's packs, by number, and its samples, as [source, index]."""
        step = event.step
        samples = [sample for batch in step.microbatches for sample in batch.sample_ids]
        line = {"step": event.state.step, "packs": list(step.packs), "samples": samples}
        self._lines.write({**line, **self._passed_over})
        self._passed_over = {}

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def trained_after(step: int, run_dir: Path, mesh: Mesh) -> dict[str, Any]:
    """Packs and samples after ``step``, and what was passed over there, for the ledger to keep.

    Of this rank's file, and of its share of those that more ranks have left. What is damaged there
    is left out: a ledger decides nothing.
    """
    packs: list[int] = []
    samples: list[list[int]] = []
    files = sorted((run_dir / LEDGER).glob("dp_*.jsonl"))
    for line in chain.from_iterable(map(read_lines, files[mesh.dp_rank :: mesh.dims.dp])):
        if line["step"] > step:
            for found in (line.get("passed_over"), line):
                packs += _listed(found, "packs")
                samples += _listed(found, "samples")
    return {"packs": packs, "samples": samples}


def _listed(found: object, key: str) -> list[Any]:
    """What a line lists under a key; nothing where it has no such list."""
    listed = found.get(key) if isinstance(found, dict) else None
    return listed if isinstance(listed, list) else []

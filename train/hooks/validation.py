"""Validation loss every ``train.validate_every`` steps, on the same packs in any layout."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triptych.configs.schema import Config
from triptych.data.batch import Batch, Step
from triptych.parallel.device import Upload
from triptych.parallel.mesh import Mesh
from triptych.parallel.schedule import LossFunction
from triptych.train.engine import Engine
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.step import count, counted, over_ranks, run_forward


class Validation(Hook):
    """Adds ``validation_loss`` and that of each source to the step's metrics; on every rank."""

    def __init__(self, config: Config, engine: Engine, step: Step) -> None:
        self._every = config.train.validate_every
        self._engine, self._step, self._sources = engine, step, list(config.data.validation)

    def measure(self, event: StepEvent) -> Mapping[str, Any]:
        """Validate where it is time to, and at the last step."""
        if event.state.step % self._every and not event.is_last:
            return {}
        engine = self._engine
        loss, by_source = validation_loss(engine.chunks, self._step, engine.mesh)
        named = dict(zip(self._sources, by_source, strict=True))
        return {"validation_loss": loss, "validation_loss_by_source": named}


def validation_loss(
    chunks: Sequence[nn.Module], step: Step, mesh: Mesh
) -> tuple[float, list[float | None]]:
    """Mean loss over the supervised tokens of all ranks' batches, and over those of each source.

    None for a source that has no such tokens. Every rank must call this.
    """
    totals, num_sources = count(step, mesh), step.num_sources

    def forward(chunk: nn.Module, batch: Batch) -> tuple[Tensor, LossFunction[Tensor]]:
        of_segments = chunk(batch, by_segment=True)
        return of_segments, lambda sums: counted(
            sums, batch.num_supervised_tokens, _by_source(sums, batch, num_sources)
        )

    with torch.no_grad():
        sums = run_forward(chunks, step.microbatches, mesh, forward, forward_only=True)
        total = torch.zeros(num_sources + 1, dtype=torch.float64, device=mesh.device)
        for column, of_microbatches in enumerate(torch.stack(sums, dim=1) if sums else ()):
            total[column] = of_microbatches.sum()
        *by_source, loss_sum = over_ranks(total, mesh).tolist()
    return loss_sum / max(1, totals.num_supervised_tokens), [
        loss / count if count else None
        for loss, count in zip(by_source, totals.supervised_by_source, strict=True)
    ]


def _by_source(sums: Tensor, batch: Batch, num_sources: int) -> Tensor:
    """(num_sources + 1,) from the loss of (num_segments + 1,); the last is that of all."""
    upload = Upload(sums.device)
    sources = upload(torch.tensor([sample.source for sample in batch.sample_ids]))
    upload.wait()
    found = sums.new_zeros(num_sources + 1)
    found.index_add_(0, sources, sums[: len(sources)])
    found[-1] = sums[-1]
    return found

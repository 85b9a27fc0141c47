"""Our model in one process: its weights from a Hugging Face folder, its samples in one pack."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from triptych.checkpoints.hf.folder import HFReader
from triptych.checkpoints.hf.name_table import name_table
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.data.batch import Batch
from triptych.data.loading.collate import Segment, collate
from triptych.data.types import SampleId
from triptych.models.build import build_model
from triptych.models.kernels import choose_here
from triptych.models.parameters import global_parameters
from triptych.parallel.mesh import Mesh, build_mesh, init_distributed, shutdown
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.reference import TOKENS, Conversation, Outcome


@contextmanager
def alone() -> Iterator[Mesh]:
    """A process group of this process only; one thread, as more only slow models this small."""
    init_distributed(HANG_S)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield build_mesh(1, 1, seed=0, timeout_s=HANG_S)
    finally:
        torch.set_num_threads(num_threads)
        shutdown()


def load_ours(
    folder: Path, model: ModelConfig, mesh: Mesh, precision: Precision = Precision.fp32
) -> nn.Module:
    """The model with the weights of a Hugging Face folder."""
    layers, kernels = [model.language.num_layers], choose_here(Kernels.auto, precision)
    [piece] = build_model(model, ParallelConfig(), precision, layers, mesh, kernels)
    reader = HFReader(folder, model)
    with torch.no_grad():
        for name, parameter in global_parameters([piece]):
            parameter.copy_(reader.read(name))
    return piece


def pack(samples: Sequence[Conversation], *, pad_to: int = 1) -> Batch:
    """All samples in one batch, as the loader makes it."""
    return collate(
        segments_of(samples), ModelConfig(tokens=TOKENS), pad_to=pad_to, with_pixels=True
    )


def segments_of(samples: Sequence[Conversation]) -> list[Segment]:
    """The samples as the loader's segments."""
    return [
        Segment(
            SampleId(0, i),
            sample.input_ids,
            sample.targets,
            np.array(sample.grids, np.int64).reshape(-1, 3),
            (sample.pixels,),
        )
        for i, sample in enumerate(samples)
    ]


def logits_by_sample(piece: nn.Module, batch: Batch) -> list[Tensor]:
    """(num_tokens, vocab) of each sample of the pack; padding left out."""
    with torch.no_grad():
        logits = piece(_beside(piece, batch), with_loss=False)[0]
    lengths = np.diff(batch.segments).tolist()
    return list(logits.cpu().split(lengths))[: len(batch.sample_ids)]


def backward(piece: nn.Module, batch: Batch, *, divisor: int = 1) -> float:
    """Add the gradient of the summed loss / ``divisor``; returns the summed loss."""
    loss_sum = piece(_beside(piece, batch))
    (loss_sum / divisor).backward()
    return loss_sum.item()


def run_ours(piece: nn.Module, batch: Batch, model: ModelConfig) -> Outcome:
    """Logits, mean loss and gradients of one pack."""
    piece.zero_grad()
    count = int(batch.loss_mask.sum())
    loss_sum = backward(piece, batch, divisor=count)
    logits = logits_by_sample(piece, batch)
    return Outcome(logits, loss_sum / count, gradients(piece, model))


def _beside(piece: nn.Module, batch: Batch) -> Batch:
    """The batch on the device of the model."""
    device = next(piece.parameters()).device
    return batch.each(lambda tensor: tensor.to(device))


def gradients(piece: nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    """By Hugging Face name, in the shapes of Hugging Face tensors."""
    table = name_table(model)
    grads: dict[str, Tensor] = {}
    for name, parameter in global_parameters([piece]):
        if parameter.grad is not None:
            parts = table[name].transform.to_theirs(parameter.grad.cpu())
            grads |= dict(zip(table[name].theirs, parts, strict=True))
    return grads

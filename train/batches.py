"""From what this rank's loader made to what the model takes.

Who reads pixels tells the others, nobody decodes twice.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from triptych.data.types import Batch, Step, UnreadableSample
from triptych.parallel.device import upload
from triptych.parallel.mesh import ChunkPlace, Mesh, broadcast_from_source


def drop_unreadable(step: Step, unreadable: Iterable[UnreadableSample]) -> None:
    """Take samples whose media could not be read out of the loss of this rank."""
    for sample in unreadable:
        batch = step.microbatches[sample.microbatch]
        start, end = batch.segments[sample.segment : sample.segment + 2]
        batch.loss_mask[start:end] = False


def to_device(batch: Batch, mesh: Mesh, place: ChunkPlace) -> Batch:
    """What a chunk of this rank needs of a batch, on its device.

    Tokens and pixels, read here or received, go to the model's first chunk, labels to its last,
    positions to all.
    Every rank of ``tp_group`` must call this, in the same order of microbatches.
    """
    pixels = None
    if place.is_first and batch.num_patches:
        pixels = batch.pixel_values
        if pixels is None:
            pixels = torch.empty(
                batch.num_patches, batch.patch_dim, dtype=torch.uint8, device=mesh.device
            )
        pixels = broadcast_from_source(upload(pixels, mesh.device), mesh.tp_group)
    fields = ["position_ids"]
    fields += ["input_ids", "vision_index"] if place.is_first else []
    fields += ["labels"] if place.is_last else []
    moved: dict[str, Any] = {name: upload(getattr(batch, name), mesh.device) for name in fields}
    return replace(batch, pixel_values=pixels, **moved)

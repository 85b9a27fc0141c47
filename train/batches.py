"""From what this rank's loader made to what the model takes.

Who reads pixels tells the others, nobody decodes twice.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from triptych.data.types import Batch, Step
from triptych.parallel.device import upload
from triptych.parallel.mesh import ChunkPlace, Mesh, broadcast_from_source


def drop_unreadable(step: Step, mesh: Mesh, *, asks_to_stop: bool = False) -> bool:
    """Take samples whose media could not be read out of the loss, on every rank of the replica.

    Only the reading rank knows of them. Whether a rank asks to stop travels along: returns whether
    any rank of the replica does. Every rank of ``model_group`` must call this, once per step.
    """
    spots = [(sample.microbatch, sample.segment) for sample in step.unreadable]
    if mesh.dims.tp * mesh.dims.pp > 1:
        # Summed: who does not read adds no sample, and a request may come from any rank.
        counts = torch.tensor([len(spots), asks_to_stop], dtype=torch.int64, device=mesh.device)
        dist.all_reduce(counts, group=mesh.model_group)
        num_spots, num_asking = counts.tolist()
        asks_to_stop = num_asking > 0
        if num_spots:
            table = torch.zeros(num_spots, 2, dtype=torch.int64, device=mesh.device)
            if mesh.reads_media:
                table.copy_(torch.tensor(spots))
            spots = [tuple(row) for row in broadcast_from_source(table, mesh.model_group).tolist()]
    for microbatch, segment in spots:
        batch = step.microbatches[microbatch]
        batch.loss_mask[batch.segments[segment] : batch.segments[segment + 1]] = False
    return asks_to_stop


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

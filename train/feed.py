"""From what this rank's loader made to what the model takes.

Who reads pixels tells the others, nobody decodes twice.
"""

from dataclasses import replace

import torch

from triptych.data.image import PATCH_DIM
from triptych.data.types import Batch, Step
from triptych.parallel.mesh import Mesh, broadcast_from_source


def drop_unreadable(step: Step, mesh: Mesh) -> None:
    """Take samples whose media could not be read out of the loss, on every rank of the replica.

    Only the reading rank knows of them. Every rank of ``model_group`` must call this, once per
    step.
    """
    spots = [(microbatch, segment) for microbatch, segment, _ in step.bad]
    if mesh.dims.tp * mesh.dims.pp > 1:
        count = torch.tensor([len(spots)], device=mesh.device)
        broadcast_from_source(count, mesh.model_group)
        if count.item():
            table = torch.zeros(int(count), 2, dtype=torch.int64, device=mesh.device)
            if mesh.reads_media:
                table.copy_(torch.tensor(spots))
            spots = [tuple(row) for row in broadcast_from_source(table, mesh.model_group).tolist()]
    for microbatch, segment in spots:
        batch = step.microbatches[microbatch]
        batch.loss_mask[batch.segments[segment] : batch.segments[segment + 1]] = False


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on this rank's device; on the first stage with pixels, read here or received.

    Every rank of ``tp_group`` must call this, in the same order of microbatches.
    """
    pixels = None
    if mesh.is_first_stage and batch.num_patches:
        pixels = batch.pixel_values
        if pixels is None:
            pixels = torch.empty(batch.num_patches, PATCH_DIM, dtype=torch.uint8)
        pixels = broadcast_from_source(pixels.to(mesh.device, non_blocking=True), mesh.tp_group)
    fields = ("input_ids", "labels", "loss_mask", "position_ids", "vision_index")
    moved = {name: getattr(batch, name).to(mesh.device, non_blocking=True) for name in fields}
    return replace(batch, pixel_values=pixels, **moved)

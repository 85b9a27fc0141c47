"""From what this rank's loader made to what its chunks of the model take.

Who reads pixels tells the others, nobody decodes twice.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from triptych.data.batch import Batch
from triptych.parallel.device import Upload
from triptych.parallel.mesh import ChunkPlace, Mesh, broadcast_from_source


def on_device(batches: Iterable[Batch], mesh: Mesh, place: ChunkPlace) -> Iterator[Batch]:
    """The batches as a chunk of this rank takes them, each uploaded while the one before computes.

    Pixels, read here or received, go to the model's first chunk; all else, which is small, to all.
    Every rank of ``tp_group`` must take every batch, in the same order.
    """
    begun: deque[tuple[Batch, Upload]] = deque()
    for batch in batches:
        upload = Upload(mesh.device)
        taken = batch if place.is_first else replace(batch, pixel_values=None)
        begun.append((taken.each(upload), upload))
        if len(begun) > 1:
            yield _arrived(*begun.popleft(), mesh, place)
    for last in begun:
        yield _arrived(*last, mesh, place)


def _arrived(batch: Batch, upload: Upload, mesh: Mesh, place: ChunkPlace) -> Batch:
    """The batch for kernels launched from now on, with pixels where they are needed."""
    upload.wait()
    if not (place.is_first and batch.num_patches):
        return replace(batch, pixel_values=None)
    pixels = batch.pixel_values
    if pixels is None:
        shape = (batch.num_patches, batch.patch_dim)
        pixels = torch.empty(shape, dtype=torch.uint8, device=mesh.device)
    return replace(batch, pixel_values=broadcast_from_source(pixels, mesh.tp_group))

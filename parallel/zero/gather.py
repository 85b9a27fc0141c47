"""Whole tensors from the pieces that data-parallel ranks have of them."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from triptych.parallel.mesh import Mesh

Shard = tuple[Tensor, Tensor | None, int]
"""A parameter, this rank's piece of something of its shape, if any, and where that starts."""
BUCKET_NUMEL = 2**24


def gather_whole(shards: Iterable[Shard], mesh: Mesh) -> Iterator[Tensor]:
    """Whole fp32 tensors on the device, each of the shape of its parameter.

    Sums in which each element is not zero on one rank only, of many small tensors at once; of their
    bits, as a sum of numbers would lose the sign of a zero. The device has room for
    ``BUCKET_NUMEL`` elements or for one tensor, not for all. The host does not wait for it.

    Args:
        shards: of the same parameters in the same order on every rank of ``dp_group``, which all
            must take every tensor.
        mesh: this rank's place.
    """
    for bucket in _buckets(shards):
        sizes = [parameter.numel() for parameter, _, _ in bucket]
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device=mesh.device)
        wholes = flat.split(sizes)
        for whole, (_, shard, start) in zip(wholes, bucket, strict=True):
            if shard is not None:
                whole[start : start + shard.numel()] = shard.detach().flatten()
        if mesh.dims.dp > 1:
            dist.all_reduce(flat.view(torch.int32), group=mesh.dp_group)
        for whole, (parameter, _, _) in zip(wholes, bucket, strict=True):
            yield whole.view(parameter.shape)


def _buckets(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    """In order; of ``BUCKET_NUMEL`` elements at most, or of one parameter."""
    bucket: list[Shard] = []
    numel = 0
    for shard in shards:
        size = shard[0].numel()
        if bucket and numel + size > BUCKET_NUMEL:
            yield bucket
            bucket, numel = [], 0
        bucket.append(shard)
        numel += size
    if bucket:
        yield bucket

"""Tensors made whole from the pieces of data-parallel ranks."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from triptych.parallel.mesh import build_mesh
from triptych.parallel.zero import gather
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.pretend_cuda import pretended_cuda

SHAPES = ((3, 4), (1,), (5,), (40,), (2, 2, 2))


def value(index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(SHAPES[index], generator=generator)


def gather_on_this_rank(bucket_numel: int) -> tuple[int, int]:
    """How many tensors came out right, and how many sums that took."""
    mesh = build_mesh(1, 1, seed=0, timeout_s=HANG_S)
    shards = []
    for index, shape in enumerate(SHAPES):
        numel = value(index).numel()
        start, end = (numel * (mesh.dp_rank + i) // mesh.dims.dp for i in (0, 1))
        piece = value(index).flatten()[start:end] if end > start else None
        shards.append((torch.empty(shape), piece, start))
    with (
        mock.patch.object(gather, "BUCKET_NUMEL", bucket_numel),
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
    ):
        wholes = list(gather.gather_whole(iter(shards), mesh))
    right = sum(torch.equal(whole, value(index)) for index, whole in enumerate(wholes))
    return right, sums.call_count


@pytest.mark.distributed
@pytest.mark.parametrize(("bucket_numel", "num_sums"), [(1, 5), (18, 3), (57, 2), (58, 2), (66, 1)])
def test_whole_again_in_buckets_of_any_size(bucket_numel, num_sums, pool):
    assert pool(2).run(gather_on_this_rank, bucket_numel=bucket_numel) == [(5, num_sums)] * 2


def waits_on_cuda(bucket_numel: int) -> list[str]:
    with pretended_cuda() as device, mock.patch.object(gather, "BUCKET_NUMEL", bucket_numel):
        mesh = build_mesh(1, 1, seed=0, timeout_s=HANG_S)
        wanted = [value(index) for index in range(len(SHAPES))]
        shards = [(each, each.pin_memory().to("cuda", non_blocking=True), 0) for each in wanted]
        wholes = list(gather.gather_whole(iter(shards), mesh))
        waits = [str(wait) for wait in device.waits]
        assert all(
            torch.equal(whole.cpu(), want) for whole, want in zip(wholes, wanted, strict=True)
        )
        return waits


@pytest.mark.distributed
def test_a_device_is_not_waited_for(pretended_pool):
    [waits] = pretended_pool(1).run(waits_on_cuda, bucket_numel=18)
    assert waits == []

"""Batches are uploaded one ahead; the kernels of a device wait for them, the host does not."""

from unittest import mock

import pytest
import torch

from triptych.data.batch import Batch
from triptych.models.feed import on_device
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.layouts import make_step
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.pretend_cuda import pretended_cuda

pytestmark = pytest.mark.distributed


def uploads() -> tuple[list[int], list[tuple[int, int, int]], list[str]]:
    """Tensors of each batch; begun, waited for and kept, as each is handed out; host waits."""
    begun: list[torch.cuda.Stream] = []
    waited_for: list[int] = []
    kept: list[torch.Tensor] = []

    def record_event(stream: torch.cuda.Stream) -> int:
        begun.append(stream)
        return len(begun)

    def wait_event(_: torch.cuda.Stream, number: int) -> None:
        waited_for.append(number)

    with (
        pretended_cuda() as device,
        mock.patch.object(torch.cuda.Stream, "record_event", record_event),
        mock.patch.object(
            torch.cuda.Stream, "wait_event", lambda _, event: waited_for.append(event)
        ),
        mock.patch.object(torch.Tensor, "record_stream", lambda tensor, _: kept.append(tensor)),
    ):
        mesh = build_mesh(1, 1, seed=0, timeout_s=HANG_S)
        [place] = mesh.places(1)
        batches = make_step("some", mesh, 1).microbatches
        device.waits.clear()
        seen = []
        for batch in on_device(batches, mesh, place):
            assert all(tensor.is_cuda for tensor in tensors_of(batch))
            seen.append((len(begun), waited_for[-1], len(kept)))
        return [len(tensors_of(batch)) for batch in batches], seen, list(map(str, device.waits))


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.each(found.append)
    return found


def test_one_ahead_and_only_kernels_wait(pretended_pool):
    [(counts, seen, waits)] = pretended_pool(1).run(uploads)
    for number, (begun, waited_for, kept) in enumerate(seen):
        assert waited_for == kept == sum(counts[: number + 1])
        assert begun == sum(counts[: number + 2])
    assert waits == []

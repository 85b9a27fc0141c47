"""Mistakes that a CPU forgives are caught on a pretended device, each with the line that made it.

    pytest -s tests/parallel/test_planted_cuda_mistakes.py  # prints what each comes to

A mistake is planted in place of one function of the model, then one microbatch runs forward and
backward. What no pretended device can catch is listed in docs/kernels.md.
"""

import contextlib
import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.varlen as torch_varlen

from triptych.models import attention, linear, loss
from triptych.models.loss import SummedLoss
from triptych.models.qwen_vl.model import Qwen2VL
from triptych.parallel.device import Upload
from triptych.tests.helpers.layouts import Layout, LayoutCase, engine_of, make_step
from triptych.tests.helpers.pretend_cuda import pretended_cuda
from triptych.train.step import microbatch_losses

pytestmark = pytest.mark.distributed
Planting = Callable[[], AbstractContextManager[object]]


@dataclass
class Caught:
    """What came of a mistake."""

    loss: float | None
    error: str
    """Empty where nothing was raised."""
    traceback: str
    waits: list[str]
    """Those during the microbatch."""


def on_embeddings(change: Callable[[Any, Any], Any]) -> AbstractContextManager[object]:
    """``change(h_T1H, batch)`` of the model's input."""
    embed = Qwen2VL._embed
    return mock.patch.object(Qwen2VL, "_embed", lambda self, b: change(embed(self, b), b))


def on_attention(change: Callable[..., Any]) -> AbstractContextManager[object]:
    """``change(varlen_attn, q, k, v, *rest, **options)`` in place of the kernel for packs."""
    kernel = torch_varlen.varlen_attn

    def changed(*args: Any, **options: Any) -> Any:
        return change(kernel, *args, **options)

    changed.__wrapped__ = kernel  # its signature is asked for
    return mock.patch.object(torch_varlen, "varlen_attn", changed)


def mask_left_on_the_host():
    return on_embeddings(lambda h, batch: h.masked_fill(batch.loss_mask[:, None, None], 0.0))


def range_made_on_the_host():
    return on_embeddings(lambda h, _: h * torch.arange(len(h))[:, None, None].lt(10**6))


def tensor_of_another_device():
    return on_embeddings(lambda h, _: h + torch.zeros(h.shape, device="cuda:0", dtype=h.dtype))


def numpy_of_a_cuda_tensor():
    return on_embeddings(lambda h, _: h * float(h.detach().float().numpy().max() > -1e9))


def finite_asserted():
    def check(h, _):
        assert h.isfinite().all()
        return h

    return on_embeddings(check)


def largest_printed():
    return on_embeddings(lambda h, _: h * (h.detach().abs().max().item() >= 0))


def copied_to_the_host():
    return on_embeddings(lambda h, _: h + h.detach().cpu().sum().mul(0.0))


def device_waited_for():
    def wait(h, _):
        torch.cuda.synchronize()
        return h

    return on_embeddings(wait)


def event_waited_for():
    def wait(h, _):
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        return h

    return on_embeddings(wait)


def list_sent_to_the_device():
    return on_embeddings(lambda h, _: h * torch.tensor([1.0], device=h.device, dtype=h.dtype))


def pinned_and_waited_for():
    return on_embeddings(lambda h, _: h * torch.ones(1, dtype=h.dtype).pin_memory().to(h.device))


def positions_listed():
    return on_embeddings(lambda h, b: h * (len(b.position_ids.tolist()) > 0))


def indexed_by_a_mask():
    return on_embeddings(lambda h, b: h + 0.0 * h[b.position_ids[0] >= 0].sum())


def positions_of_a_mask():
    return on_embeddings(lambda h, b: h + 0.0 * len(b.position_ids.nonzero()))


def repeated_by_counts_on_the_device():
    ones = torch.ones_like
    return on_embeddings(lambda h, b: h.repeat_interleave(ones(b.position_ids[0]), dim=0))


def indexed_by_a_list():
    return on_embeddings(lambda h, _: h[list(range(len(h)))])


def uploaded_from_pageable_memory():
    def unpinned(self, tensor):
        return tensor.to(self._device, non_blocking=True)

    return mock.patch.object(Upload, "__call__", unpinned)


def bounds_in_int64():
    init = attention.Segments.__init__

    def in_int64(self, *args):
        init(self, *args)
        self.cu_seqlens_q = self.cu_seqlens_q.long()

    return mock.patch.object(attention.Segments, "__init__", in_int64)


def argument_of_attention_left_out():
    def left_out(kernel, q, k, v, cu_q, cu_k, max_q, max_k, **options):
        return kernel(q, k, v, cu_q, cu_k, max_q, **options)

    return on_attention(left_out)


def attention_in_fp32():
    def in_fp32(kernel, q, k, v, *rest, **options):
        return kernel(q.float(), k.float(), v.float(), *rest, **options).to(q.dtype)

    return on_attention(in_fp32)


def heads_not_contiguous():
    def strided(kernel, q, *rest, **options):
        return kernel(q.transpose(1, 2).contiguous().transpose(1, 2), *rest, **options)

    return on_attention(strided)


def longest_as_a_tensor():
    def as_tensor(kernel, q, k, v, cu_q, cu_k, max_q, max_k, **options):
        return kernel(q, k, v, cu_q, cu_k, cu_q.diff().amax(), max_k, **options)

    return on_attention(as_tensor)


def attention_not_causal():
    def all_seen(kernel, *args, window_size, **options):
        return kernel(*args, window_size=(-1, -1), **options)

    return on_attention(all_seen)


def supervised_index_left_on_the_host():
    forward = SummedLoss.forward

    def indexed(self, hidden, labels, index, **options):
        return forward(self, hidden, labels, index.cpu(), **options)

    return mock.patch.object(SummedLoss, "forward", indexed)


def number_read_in_the_backward_pass():
    backward = loss._SummedCrossEntropy.backward

    def read(ctx, *grads):
        return backward(ctx, *(grad * (grad.item() != 0) for grad in grads))

    return mock.patch.object(loss._SummedCrossEntropy, "backward", staticmethod(read))


def column_sent_as_it_lies():
    def strided(log_sum, label_logit, tp_group):
        own = torch.cat([log_sum, label_logit], 1).t()
        dist.all_reduce(own, group=tp_group)

    return mock.patch.object(loss, "_over_ranks", strided)


def argument_of_symmetric_memory_left_out():
    def left_out(piece, matrix, group):
        return torch.ops.symm_mem.fused_all_gather_matmul(piece, [matrix], group.group_name)

    return mock.patch.object(linear, "gather_matmul", left_out)


def gathered_in_another_dtype():
    def in_fp32(piece, matrix, group):
        whole = piece.new_empty(2 * len(piece), *piece.shape[1:], dtype=torch.float32)
        dist.all_gather_into_tensor(whole, piece, group=group)

    return mock.patch.object(linear, "gather_matmul", in_fp32)


def host_memory_reduced_over_nccl():
    def reduced(whole, matrix, group):
        dist.all_reduce(torch.ones(1), group=group)

    return mock.patch.object(linear, "matmul_scatter", reduced)


def nothing_planted():
    return contextlib.nullcontext()


HERE = Path(__file__).name
MIXED = "at least two devices, cuda:1 and cpu"
RAISES = {
    mask_left_on_the_host: (MIXED, HERE),
    range_made_on_the_host: (MIXED, HERE),
    tensor_of_another_device: ("at least two devices, cuda:1 and cuda:0", HERE),
    numpy_of_a_cuda_tensor: ("numpy() is not supported", HERE),
    supervised_index_left_on_the_host: (MIXED, "models/loss.py"),
    bounds_in_int64: ("needs cu_seqlens int32", "models/attention.py"),
    argument_of_attention_left_out: ("missing 1 required positional argument", HERE),
    attention_in_fp32: ("needs q, k and v in bf16", HERE),
    heads_not_contiguous: ("needs the last dimension", HERE),
}
"""On one rank: what the error says, and a file whose line it names."""
RAISES_ON_TWO_RANKS = {
    column_sent_as_it_lies: "over NCCL needs contiguous tensors",
    argument_of_symmetric_memory_left_out: "Expected a value of type 'int' for argument",
    gathered_in_another_dtype: "over NCCL needs contiguous tensors of one dtype",
    host_memory_reduced_over_nccl: "in host memory, but the group is NCCL's alone",
}
WAITS = {
    finite_asserted: "item",
    largest_printed: "item",
    copied_to_the_host: "copy to the host",
    device_waited_for: "synchronize",
    event_waited_for: "synchronize",
    list_sent_to_the_device: "pageable copy to the device",
    pinned_and_waited_for: "pageable copy to the device",
    positions_listed: "tolist",
    indexed_by_a_mask: "values asked for by aten::index",
    positions_of_a_mask: "values asked for by aten::nonzero",
    repeated_by_counts_on_the_device: "values asked for by aten::repeat_interleave",
    indexed_by_a_list: "pageable copy to the device",
    longest_as_a_tensor: "item",
    uploaded_from_pageable_memory: "pageable copy to the device",
    number_read_in_the_backward_pass: "item",
}
"""Mistakes that only cost time."""
NUMBERS = (attention_not_causal,)
"""Mistakes that show in the loss."""


def run_with(plantings: list[Planting], layout: Layout, current_device: int) -> list[Caught]:
    """One microbatch with each mistake. Every rank must call this."""
    os.environ["LOCAL_RANK"] = str(current_device + dist.get_rank())
    case = LayoutCase(layout, precision="bf16", zero="megatron+all")
    with pretended_cuda() as device:
        engine = engine_of(case)
        mesh = engine.mesh
        [*microbatches] = make_step("some", mesh, 1).microbatches[:1]
        caught = []
        for planting in plantings:
            device.waits.clear()
            total, error, where = None, "", ""
            with planting():
                try:
                    loss_sum = microbatch_losses(
                        engine.chunks, microbatches, mesh, forward_only=False
                    ).sum()
                    total = float(device.to_host(loss_sum))
                except Exception as raised:
                    error, where = str(raised), traceback.format_exc()
            waits = [str(wait) for wait in device.waits if wait.in_microbatches]
            caught.append(Caught(total, error, where, waits))
    return caught


@pytest.fixture(scope="module")
def on_one_rank(pretended_pool) -> dict[Planting, Caught]:
    """All of one rank, on the second device, so that the first is another one."""
    plantings = [nothing_planted, *RAISES, *WAITS, *NUMBERS]
    layout = Layout(layers=(1,))
    [caught] = pretended_pool(1).run(run_with, plantings=plantings, layout=layout, current_device=1)
    found = dict(zip(plantings, caught, strict=True))
    for planting, what in found.items():
        print(f"{planting.__name__:36} loss {what.loss} {what.error} {set(what.waits)}")
    return found


def test_without_a_mistake_nothing_is_caught(on_one_rank):
    clean = on_one_rank[nothing_planted]
    assert (clean.error, clean.waits) == ("", [])


@pytest.mark.parametrize("planting", RAISES, ids=lambda planting: planting.__name__)
def test_mistake_raises_with_the_line(planting, on_one_rank):
    caught, (message, file) = on_one_rank[planting], RAISES[planting]
    assert message in caught.error, caught.traceback
    assert f'{file}", line' in caught.traceback


def test_mistakes_in_messages_raise_on_every_rank(pretended_pool):
    layout = Layout(tp=2, sequence_parallel=True, layers=(1,))
    plantings = list(RAISES_ON_TWO_RANKS)
    for caught in pretended_pool(2).run(
        run_with, plantings=plantings, layout=layout, current_device=0
    ):
        for message, what in zip(RAISES_ON_TWO_RANKS.values(), caught, strict=True):
            print(what.error)
            assert message in what.error, what.traceback
            assert f'{HERE}", line' in what.traceback


@pytest.mark.parametrize("planting", WAITS, ids=lambda planting: planting.__name__)
def test_mistake_is_a_wait_with_its_place(planting, on_one_rank):
    caught = on_one_rank[planting]
    assert caught.loss == on_one_rank[nothing_planted].loss
    assert any(w.startswith(WAITS[planting]) for w in caught.waits), caught
    assert all(planting.__name__ in wait for wait in caught.waits)


@pytest.mark.parametrize("planting", NUMBERS, ids=lambda planting: planting.__name__)
def test_mistake_shows_in_the_loss(planting, on_one_rank):
    clean = on_one_rank[nothing_planted].loss
    assert abs(on_one_rank[planting].loss - clean) > 1e-2 * clean

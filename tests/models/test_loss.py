"""The chunked, vocabulary-parallel loss against torch's, over chunks, ranks, masks and freezing."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from triptych.models.loss import CHUNK_TOKENS, SummedLoss
from triptych.parallel.mesh import Mesh, build_mesh
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.single import alone

H, V = 24, 64
LONG = 2 * CHUNK_TOKENS + 344
BAR = 2e-6
"""Largest difference / largest element; measured: 6.3e-7 at most."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


def make(
    num_tokens: int, share: float, dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the whole weight, labels, and the mask of what counts."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_T1H = torch.randn(num_tokens, 1, H, generator=generator).to(dtype)
    weight_VH = torch.randn(V, H, generator=generator).to(dtype)
    labels_T = torch.randint(V, (num_tokens,), generator=generator)
    return hidden_T1H, weight_VH, labels_T, torch.rand(num_tokens, generator=generator) < share


def by_torch(hidden_T1H, weight_VH, labels_T, mask_T) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in fp64, times 3."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden_T1H, weight_VH))
    losses = F.cross_entropy((hidden @ weight.T).squeeze(1), labels_T, reduction="none")
    loss = losses[mask_T].sum()
    (3 * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def ours(
    hidden_T1H: Tensor, weight_VH: Tensor, labels_T: Tensor, mask_T: Tensor, mesh: Mesh, *, sp: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of this rank's pieces."""
    weight = nn.Parameter(weight_VH.chunk(mesh.dims.tp)[mesh.tp_rank].clone())
    hidden = hidden_T1H.chunk(mesh.dims.tp)[mesh.tp_rank] if sp else hidden_T1H
    hidden = hidden.clone().requires_grad_()
    loss = SummedLoss(weight, mesh.tp_group, sequence_parallel=sp)(
        hidden, labels_T, mask_T.nonzero().squeeze(1)
    )
    (3 * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max()) / (float(want.abs().max()) or 1.0)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 40, CHUNK_TOKENS, LONG])
def test_equals_torch(num_tokens, share, mesh):
    case = make(num_tokens, share)
    for got, want in zip(ours(*case, mesh, sp=False), by_torch(*case), strict=True):
        assert apart(got, want) <= BAR


def measure(tp: int, sp: bool, num_tokens: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    mesh = build_mesh(tp, 1, seed=0, timeout_s=HANG_S)
    loss, hidden_grad, weight_grad = ours(*make(num_tokens, share), mesh, sp=sp)
    if not sp:
        others = [torch.empty_like(hidden_grad) for _ in range(tp)]
        dist.all_gather(others, hidden_grad, group=mesh.tp_group)
        assert all(torch.equal(other, hidden_grad) for other in others)
    return loss, hidden_grad, weight_grad


@pytest.mark.distributed
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_share_the_vocabulary(tp, sp, share, pool):
    want_loss, want_hidden, want_weight = by_torch(*make(LONG, share))
    pieces = pool(tp).run(measure, tp=tp, sp=sp, num_tokens=LONG, share=share)
    losses, hidden_grads, weight_grads = zip(*pieces, strict=True)
    assert len({float(loss) for loss in losses}) == 1
    assert apart(losses[0], want_loss) <= BAR
    assert apart(torch.cat(hidden_grads) if sp else hidden_grads[0], want_hidden) <= BAR
    assert apart(torch.cat(weight_grads), want_weight) <= BAR


def test_bf16_is_as_near_as_all_logits_at_once(mesh):
    """The gradient of the weight is summed over chunks in fp32."""
    case = make(8 * CHUNK_TOKENS, 1.0, torch.bfloat16)
    exact = by_torch(*case)
    hidden, weight = (x.clone().requires_grad_() for x in case[:2])
    logits = (hidden @ weight.T).squeeze(1).float()
    (3 * F.cross_entropy(logits, case[2], reduction="sum")).backward()
    _, *grads = ours(*case, mesh, sp=False)
    for got, at_once, want in zip(grads, (hidden.grad, weight.grad), exact[1:], strict=True):
        assert got.dtype is torch.bfloat16
        assert apart(got, want) <= 1.5 * apart(at_once, want)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_more_logits_than_of_a_chunk(mesh):
    case = make(LONG, 1.0)
    with LargestTensor() as largest:
        ours(*case, mesh, sp=False)
    assert largest.numel == CHUNK_TOKENS * V < LONG * V


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_what_it_says(trains, dtype, mesh):
    hidden, weight, labels, mask = make(LONG, 0.4, dtype)
    parameter = nn.Parameter(weight, requires_grad=trains)
    loss = SummedLoss(parameter, mesh.tp_group, sequence_parallel=False)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss(hidden.requires_grad_(), labels, mask.nonzero().squeeze(1)).backward()
    num_targets = int(mask.sum())
    expected = [(num_targets,), (num_targets, H), *([(V, H)] if trains else [])]
    assert [tuple(x.shape) for x in kept] == expected
    assert {x.dtype for x in kept} == {torch.int64, dtype}
    assert (parameter.grad is not None) == trains


def test_without_gradients_computes_none(mesh):
    hidden, weight, labels, mask = make(40, 1.0)
    loss = SummedLoss(nn.Parameter(weight), mesh.tp_group, sequence_parallel=False)
    with torch.no_grad(), LargestTensor() as largest:
        assert not loss(hidden, labels, mask.nonzero().squeeze(1)).requires_grad
    assert largest.numel == 40 * V

"""The loss of a vocabulary-parallel head, without the logits of a whole pack.

Only supervised tokens get logits at all: placeholders of images and prompts need none. Those are
taken a chunk at a time: logits, cross-entropy, and at once the gradients of the hidden states and
of the weight, so that no logits outlive their chunk and none are computed twice. The backward pass
only multiplies by the gradient of the sum.

S supervised tokens, C of them in a chunk, V entries of the vocabulary on this tensor-parallel rank,
H width of the language model.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.costs.memory import CHUNK_TOKENS

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class SummedLoss(nn.Module):
    """Cross-entropy of the supervised tokens, summed.

    A module that holds the head's weight a second time: whoever gathers parameters just before they
    are used (``parallel.overlap.param_gather``) hooks onto modules.
    """

    def __init__(
        self, weight_VH: nn.Parameter, tp_group: dist.ProcessGroup, *, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.weight = weight_VH
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel

    def forward(
        self,
        hidden_T1H: Tensor,
        labels_T: Tensor,
        supervised_index: Tensor,
        *,
        segment_ends: Tensor | None = None,
    ) -> Tensor:
        """Sum the losses. Every rank of ``tp_group`` must call this.

        Keeps for the backward pass (S, H) and, where the head trains, (V, H), both in the dtype of
        the weight, and (S,) int64; without gradients, nothing. On the way the gradient of the
        weight is summed up in float32.

        Args:
            hidden_T1H: (T, 1, H), or (T / tp, 1, H) of this rank with sequence parallelism.
            labels_T: (T,) int64.
            supervised_index: (S,) int64, the positions that count; S may be 0.
            segment_ends: (num_segments,) int32; without gradients only.

        Returns:
            0-d float64, the same on every rank of ``tp_group``; with ``segment_ends``
            (num_segments + 1,), the sum of each segment, then that of all.
        """
        if self.sequence_parallel:  # its backward pass sums over the ranks, and scatters
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, group=self.tp_group)
        hidden_SH = hidden_T1H.squeeze(1).index_select(0, supervised_index)
        if not self.sequence_parallel:  # its backward pass sums over the ranks
            hidden_SH = copy_to_tensor_model_parallel_region(hidden_SH, group=self.tp_group)
        labels_S = labels_T.index_select(0, supervised_index)
        if segment_ends is not None:
            segment_S = torch.bucketize(supervised_index, segment_ends.long(), right=True)
            num_segments = len(segment_ends)
            return _by_segment(
                hidden_SH, self.weight, labels_S, self.tp_group, segment_S, num_segments
            )
        loss: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch has none
            hidden_SH, self.weight, labels_S, self.tp_group, torch.is_grad_enabled()
        )
        return loss


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes its gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        weight_VH: Tensor,
        labels_S: Tensor,
        tp_group: dist.ProcessGroup,
        with_grad: bool,
    ) -> Tensor:
        """Each rank's gradient of the hidden states is that of its piece of the vocabulary."""
        hidden_grad, weight_grad = None, None
        if with_grad and ctx.needs_input_grad[0]:
            hidden_grad = torch.empty_like(hidden_SH)
        if with_grad and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight_VH, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden_SH.device)
        for start in range(0, len(labels_S), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            logits_CV = (hidden_SH[chunk] @ weight_VH.T).float()
            total += cross_entropy_(logits_CV, labels_S[chunk], tp_group).double().sum()
            grad_CV = logits_CV.to(weight_VH.dtype)
            if hidden_grad is not None:
                torch.mm(grad_CV, weight_VH, out=hidden_grad[chunk])
            if weight_grad is not None:
                _add_product(weight_grad, grad_CV.T, hidden_SH[chunk])
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_VH.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Multiplies in place: what was saved has no other use."""
        [factor] = grad_outputs
        grads = [None if grad is None else grad.mul_(factor) for grad in ctx.saved_tensors]
        return *grads, None, None, None


def _by_segment(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    labels_S: Tensor,
    tp_group: dist.ProcessGroup,
    segment_S: Tensor,
    num_segments: int,
) -> Tensor:
    """(num_segments + 1,) float64, summed as ``_SummedCrossEntropy`` does; it has no gradient."""
    sums = torch.zeros(num_segments + 1, dtype=torch.float64, device=hidden_SH.device)
    for start in range(0, len(labels_S), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        logits_CV = (hidden_SH[chunk] @ weight_VH.T).float()
        loss_C = cross_entropy_(logits_CV, labels_S[chunk], tp_group).double()
        sums[:-1].index_add_(0, segment_S[chunk], loss_C)
        sums[-1] += loss_C.sum()
    return sums


def cross_entropy_(logits_CV: Tensor, labels_C: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Cross-entropy of each token; the logits become their gradient, in place.

    Every rank of ``tp_group`` must call this.

    Args:
        logits_CV: (C, V) float32, this rank's piece of the vocabulary.
        labels_C: (C,) int64, of the whole vocabulary.
        tp_group: cuts the vocabulary into equal pieces, in order of rank.

    Returns:
        (C,) float32, the same on every rank.
    """
    size = logits_CV.size(1)
    label_C1 = (labels_C - tp_group.rank() * size).unsqueeze(1)
    is_here_C1 = ((label_C1 >= 0) & (label_C1 < size)).float()
    label_C1 = label_C1.clamp(0, size - 1)
    label_logit_C1 = logits_CV.gather(1, label_C1) * is_here_C1
    max_C1 = logits_CV.amax(1, keepdim=True)
    logits_CV.sub_(max_C1).exp_()
    log_sum_C1 = max_C1 + logits_CV.sum(1, keepdim=True).log()
    log_sum_C1, label_logit_C1 = _over_ranks(log_sum_C1, label_logit_C1, tp_group)
    logits_CV.mul_((max_C1 - log_sum_C1).exp())
    logits_CV.scatter_add_(1, label_C1, -is_here_C1)
    return (log_sum_C1 - label_logit_C1).squeeze(1)


def _over_ranks(
    log_sum_C1: Tensor, label_logit_C1: Tensor, tp_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Both over the whole vocabulary, from those of the ranks' pieces, in one message."""
    if tp_group.size() == 1:
        return log_sum_C1, label_logit_C1
    own = torch.cat([log_sum_C1, label_logit_C1])
    gathered = own.new_empty(tp_group.size() * len(own), 1)
    dist.all_gather_into_tensor(gathered, own, group=tp_group)
    log_sums_RC1, label_logits_RC1 = gathered.view(tp_group.size(), 2, -1, 1).unbind(1)
    return log_sums_RC1.logsumexp(0), label_logits_RC1.sum(0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; in one pass where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)

"""What CUDA's kernels refuse, and what they compute where the CPU has no such kernel.

The rules are those of cuBLAS, and of the C++ entries of attention over packs (flash-attn's
mha_varlen_fwd, which torch's varlen_attn shares): what neither fake tensors nor a CPU refuses.

T tokens of the pack, N heads, K of them key/value heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

VARLEN_ATTENTIONS = ("torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


def refuse_as_cuda(name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Refuse what the kernel of this operation refuses.

    Raises:
        TypeError: names the operation, the rule and what was given.
    """
    if name in PRODUCTS and len({tensor.dtype for tensor in tensors}) > 1:
        raise TypeError(f"{name} needs one dtype, got {[tensor.dtype for tensor in tensors]}")
    if name in VARLEN_ATTENTIONS:
        _refuse_as_varlen_attention(name, *args[:7])


def _refuse_as_varlen_attention(
    name: str,
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> None:
    qkv, bounds = (q_TND, k_TKD, v_TKD), (cu_seqlens_q, cu_seqlens_k)
    heads, head_dim = q_TND.shape[1:]
    rules = {
        "q, k, v and cu_seqlens on one device": len({x.device for x in (*qkv, *bounds)}) == 1,
        "q, k and v in bf16 or fp16": len({x.dtype for x in qkv}) == 1
        and q_TND.dtype in (torch.bfloat16, torch.float16),
        "cu_seqlens int32 and contiguous": all(
            x.dtype == torch.int32 and x.is_contiguous() for x in bounds
        ),
        "the last dimension of q, k and v contiguous": all(x.stride(-1) == 1 for x in qkv),
        "head_dim a multiple of 8, 256 at most": head_dim % 8 == 0 and head_dim <= 256,
        "heads a multiple of key/value heads": heads % k_TKD.size(1) == 0,
        "k and v of one shape": k_TKD.shape == v_TKD.shape,
        "max_seqlen int": isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        given = [(tuple(x.shape), x.dtype, str(x.device)) for x in (*qkv, *bounds)]
        raise TypeError(f"{name} needs {'; '.join(broken)}; got {given}")


def _attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(T, N, D), and the logsumexp (N, T)."""
    p_NTT, logsumexp_NT, _, v_TND = _probabilities(q_TND, k_TKD, v_TKD, cu_seqlens, causal, scale)
    return torch.einsum("nqk,knd->qnd", p_NTT, v_TND).to(q_TND.dtype), logsumexp_NT


def _attention_backward(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k and v."""
    p_NTT, _, k_TND, v_TND = _probabilities(q_TND, k_TKD, v_TKD, cu_seqlens, causal, scale)
    grad_p_NTT = torch.einsum("qnd,knd->nqk", grad_TND.float(), v_TND)
    grad_s_NTT = p_NTT * (grad_p_NTT - (p_NTT * grad_p_NTT).sum(-1, keepdim=True)) * scale
    grads = [torch.einsum("nqk,knd->qnd", grad_s_NTT, k_TND)]
    for weights_NTT, x_TND in ((grad_s_NTT, q_TND), (p_NTT, grad_TND)):
        of_all_heads = torch.einsum("nqk,qnd->knd", weights_NTT, x_TND.float())
        grads.append(of_all_heads.unflatten(1, (k_TKD.size(1), -1)).sum(2))
    return [grad.to(q_TND.dtype) for grad in grads]


def _probabilities(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, cu_seqlens: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(N, T, T) within segments, their logsumexp, and k and v repeated for every head, in fp32."""
    segment_T = torch.bucketize(torch.arange(len(q_TND)), cu_seqlens[1:].long(), right=True)
    sees_TT = segment_T[:, None] == segment_T[None, :]
    k_TND, v_TND = (
        x.float().repeat_interleave(q_TND.size(1) // x.size(1), dim=1) for x in (k_TKD, v_TKD)
    )
    scores_NTT = torch.einsum("qnd,knd->nqk", q_TND.float(), k_TND) * scale
    unseen_TT = ~(sees_TT.tril() if causal else sees_TT)
    scores_NTT = scores_NTT.masked_fill(unseen_TT, float("-inf"))
    return scores_NTT.softmax(-1), scores_NTT.logsumexp(-1), k_TND, v_TND


LOOKS_BACK = (-1, 0)
"""The window of causal attention."""


def _torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window, *_, **__):
    attended, logsumexp = _attention(q, k, v, cu_q, tuple(window) == LOOKS_BACK, scale)
    return attended, logsumexp, torch.zeros(2, dtype=torch.uint64)


def _torch_varlen_backward(
    grad, q, k, v, out, logsumexp, cu_q, cu_k, max_q, max_k, is_causal, rng, scale, window, *_, **__
):
    return _attention_backward(grad, q, k, v, cu_q, tuple(window) == LOOKS_BACK, scale)


def _flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, causal, *_, **__):
    attended, logsumexp = _attention(q, k, v, cu_q, causal, scale)
    return attended, logsumexp, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


def _flash_backward(
    grad, q, k, v, out, logsumexp, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout, scale, causal,
    *_, **__,
):  # fmt: skip
    grads = _attention_backward(grad, q, k, v, cu_q, causal, scale)
    for place, value in zip((dq, dk, dv), grads, strict=True):
        place.copy_(value)
    return torch.zeros(q.size(1), len(q) + 128 * (len(cu_q) - 1))


def _layer_norm(x, shape, weight, bias, eps):
    """CUDA keeps mean and deviation in fp32, the CPU in the dtype of ``x``."""
    wide = (x.float(), shape, weight.float(), bias.float(), eps)
    normalized, mean, rstd = torch.ops.aten.native_layer_norm(*wide)
    return normalized.to(x.dtype), mean, rstd


def _layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, mask):
    """CUDA sums the gradients of weight and bias in fp32, the CPU in the dtype of ``x``."""
    wide = (grad.float(), x.float(), shape, mean, rstd, weight.float(), bias.float(), mask)
    grads = torch.ops.aten.native_layer_norm_backward(*wide)
    return [None if grad is None else grad.to(x.dtype) for grad in grads]


KERNELS: dict[str, Callable[..., Any]] = {
    "torch_attn::_varlen_attn": _torch_varlen,
    "torch_attn::_varlen_attn_backward": _torch_varlen_backward,
    "flash_attn::_flash_attn_varlen_forward": _flash,
    "flash_attn::_flash_attn_varlen_backward": _flash_backward,
    "aten::native_layer_norm": _layer_norm,
    "aten::native_layer_norm_backward": _layer_norm_backward,
    "symm_mem::fused_all_gather_matmul": symmetric_memory._fused_all_gather_matmul_fallback,
    "symm_mem::fused_matmul_reduce_scatter": symmetric_memory._fused_matmul_reduce_scatter_fallback,
}
"""By operation: computes on the values, in host memory."""

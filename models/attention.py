"""Core attention over packed segments, causal or not: one module, plugged in by ModuleSpec.

Which kernel attends is chosen once (models/kernels.py); never is there a dense block mask over the
whole pack.

T tokens of the pack, N heads of this tensor-parallel rank, K of them key/value heads, D head_dim.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.data.partition import Partition
from triptych.models.kernels import Kernel
from triptych.models.kv_cache import KeyValueCache
from triptych.parallel.device import is_deterministic

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

VarlenAttention = Callable[[Tensor, Tensor, Tensor, "Segments", bool, float], Tensor]


class Segments(PackedSeqParams):
    """Where the segments of a pack begin and end, on the way to our core attention.

    It travels as ``packed_seq_params``, which megatron-core keeps per microbatch also under
    recomputation, but says ``qkv_format="sbhd"``: with "thd" megatron-core would give every segment
    the rotary angles of the pack's first positions wherever the pack is padded. So rotary positions
    stay per token, and T stays the first dimension of (T, 1, ...).
    """

    def __init__(
        self,
        segments: Partition,
        windows: Partition | None = None,
        *,
        cache: KeyValueCache | None = None,
    ) -> None:
        """Take the segments; windows, if some layers see those; what prompts are continued from."""
        cu_seqlens = segments.cu_seqlens
        longest = max(end - start for start, end in pairwise(segments.bounds))
        super().__init__(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        self.bounds, self.cache = segments.bounds, cache
        self.windows = Segments(windows) if windows else None


class PackedCoreAttention(MegatronModule):
    """Softmax attention within each segment, or within each window of a layer that sees those.

    Constructor and call as megatron-core's DotProductAttention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
        kernel: Kernel = Kernel.PER_SEGMENT,
        sees_windows: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.attend = VARLEN_ATTENTIONS[kernel]
        self.causal = attn_mask_type == AttnMaskType.causal
        self.sees_windows = sees_windows
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: Segments | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (T, 1, N, D).
            key: (T, 1, K, D), K divides N.
            value: (T, 1, K, D).
            attention_mask: not used; segments replace it.
            attn_mask_type: not used; fixed at construction.
            attention_bias: not used.
            packed_seq_params: where segments begin and end.

        Returns:
            (T, 1, N * D).
        """
        segments = packed_seq_params
        if segments is not None and self.sees_windows:
            segments = segments.windows
        assert segments is not None, "packed attention needs the pack's segments"
        q_TND, k_TKD, v_TKD = (x.squeeze(1) for x in (query, key, value))
        cache = segments.cache
        if cache is not None and cache.has(self):
            out_TND = cache.attend(self, q_TND, k_TKD, v_TKD, self.scale)
        else:
            out_TND = self.attend(q_TND, k_TKD, v_TKD, segments, self.causal, self.scale)
            if cache is not None:
                cache.keep(self, k_TKD, v_TKD, segments.bounds)
        return out_TND.reshape(query.size(0), 1, -1)


def attention_per_segment(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, segments: Segments, causal: bool, scale: float
) -> Tensor:
    """One scaled_dot_product_attention for each run of segments of equal length.

    Returns (T, N, D).
    """
    runs = _equal_runs(segments.bounds)
    if q_TND.device.type == "cpu":
        out: Tensor = _PerSegmentOnCpu.apply(  # type: ignore[no-untyped-call]  # torch has none
            q_TND, k_TKD, v_TKD, runs, causal, scale
        )
        return out
    outputs = []
    for q, k, v in zip(*(_by_run(x, runs) for x in (q_TND, k_TKD, v_TKD)), strict=True):
        piece = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
        outputs.append(piece.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


class _PerSegmentOnCpu(torch.autograd.Function):
    """The same as one node of the graph, over the kernel that torch takes on a CPU.

    A pack of short samples has dozens of runs, and autograd spends longer on the cutting and
    joining of each than the kernel on attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_TND: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        runs: Sequence[tuple[int, int]],
        causal: bool,
        scale: float,
    ) -> Tensor:
        ctx.runs, ctx.causal, ctx.scale = runs, causal, scale
        pieces = zip(*(_by_run(x, runs) for x in (q_TND, k_TKD, v_TKD)), strict=True)
        attended = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, scale=scale
            )
            for q, k, v in pieces
        ]
        kept = [tensor for piece in attended for tensor in piece]
        ctx.save_for_backward(q_TND, k_TKD, v_TKD, *kept)
        return torch.cat([piece.transpose(1, 2).flatten(0, 1) for piece, _ in attended])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TND,) = grads
        q_TND, k_TKD, v_TKD, *kept = ctx.saved_tensors
        inputs = [_by_run(x, ctx.runs) for x in (grad_TND, q_TND, k_TKD, v_TKD)]
        results = [x.new_empty(x.shape) for x in (q_TND, k_TKD, v_TKD)]
        places = [_by_run(x, ctx.runs) for x in results]
        for grad, q, k, v, out, logsumexp, *where in zip(
            *inputs, kept[::2], kept[1::2], *places, strict=True
        ):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, logsumexp, 0.0, ctx.causal, scale=ctx.scale
            )
            for place, value in zip(where, found, strict=True):
                place.copy_(value)
        return *results, None, None, None


def _by_run(x_TND: Tensor, runs: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views of each run, (number of segments, N, segment length, D)."""
    pieces = x_TND.split([length * count for length, count in runs])
    return [
        piece.unflatten(0, (count, length)).transpose(1, 2)
        for piece, (length, count) in zip(pieces, runs, strict=True)
    ]


def _equal_runs(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """(segment length, number of segments) of each run of neighbours of one length.

    These share a call.
    """
    lengths = (end - start for start, end in pairwise(bounds))
    return [(length, sum(1 for _ in run)) for length, run in groupby(lengths)]


def _flash_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, segments: Segments, causal: bool, scale: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _by_flash(flash_attn_varlen_func, q_TND, k_TKD, v_TKD, segments, causal, scale)


def _flash_attention_3(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, segments: Segments, causal: bool, scale: float
) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _by_flash(flash_attn_varlen_func, q_TND, k_TKD, v_TKD, segments, causal, scale)


def _by_flash(
    function: Callable[..., Any],
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> Tensor:
    """The function of either version; the first releases of 3 give logsumexp along."""
    cu_seqlens, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    out: Any = function(
        q_TND,
        k_TKD,
        v_TKD,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        softmax_scale=scale,
        causal=causal,
        deterministic=is_deterministic(),
    )
    attended: Tensor = out[0] if isinstance(out, tuple) else out
    return attended


def _torch_varlen_attention(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, segments: Segments, causal: bool, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale}
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" in parameters:  # since torch 2.11; (-1, 0) looks back, never ahead
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if "enable_gqa" in parameters:
        options["enable_gqa"] = q_TND.size(1) != k_TKD.size(1)
    elif q_TND.size(1) != k_TKD.size(1):
        groups = q_TND.size(1) // k_TKD.size(1)
        k_TKD, v_TKD = (x.repeat_interleave(groups, dim=1) for x in (k_TKD, v_TKD))
    cu_seqlens, longest = segments.cu_seqlens_q, segments.max_seqlen_q
    out: Any = varlen_attn(q_TND, k_TKD, v_TKD, cu_seqlens, cu_seqlens, longest, longest, **options)
    attended: Tensor = out
    return attended


VARLEN_ATTENTIONS: dict[Kernel, VarlenAttention] = {
    Kernel.FLASH_ATTENTION_3: _flash_attention_3,
    Kernel.FLASH_ATTENTION: _flash_attention,
    Kernel.TORCH_VARLEN: _torch_varlen_attention,
    Kernel.PER_SEGMENT: attention_per_segment,
}

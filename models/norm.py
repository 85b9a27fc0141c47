"""Norms for megatron-core layers that work with sequence parallelism on any device.

megatron-core's own torch norm refuses sequence parallelism; its fused ones need apex or Transformer
Engine. Only a mark on the weight is needed: it tells megatron-core to sum the weight's gradient
over the tensor-parallel ranks.
"""

from torch import Tensor, nn

from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension; constructor as megatron-core builds it from a spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_shared(self, config)


class LigerRMSNorm(RMSNorm):
    """The same by liger-kernel: one Triton kernel forward, one backward; CUDA only."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, scale; the inverse norm in fp32."""
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        offset, casting, in_place = 0.0, "llama", False
        normed: Tensor = LigerRMSNormFunction.apply(
            x, self.weight, self.eps, offset, casting, in_place
        )
        return normed


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension; constructor as megatron-core builds it from a spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark_shared(self, config)


def mark_shared(module: nn.Module, config: TransformerConfig) -> None:
    """Where each rank sees its own rows only, their gradients are to be summed over the ranks."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron's mark

"""Norms for megatron-core layers that work with sequence parallelism on any device.

megatron-core's own torch norm refuses sequence parallelism; its fused ones need apex or Transformer
Engine. Only a mark on the weight is needed: it tells megatron-core to sum the weight's gradient
over the tensor-parallel ranks.
"""

from torch import nn

from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension; constructor as megatron-core builds it from a spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension; constructor as megatron-core builds it from a spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


def _mark(norm: nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # megatron's mark

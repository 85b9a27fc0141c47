"""Layer specs.

Megatron-core's transformer layers with our norm and our packed core attention plugged in.
"""

from triptych.models.attention import PackedCoreAttention
from triptych.models.norm import LayerNorm, RMSNorm

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)


def language_block(num_layers: int) -> TransformerBlockSubmodules:
    """``num_layers`` causal decoder layers and a final RMSNorm."""
    layer = _layer(RMSNorm, AttnMaskType.causal)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def vision_block(num_layers: int) -> TransformerBlockSubmodules:
    """``num_layers`` layers that look both ways within a frame; no final norm."""
    layer = _layer(LayerNorm, AttnMaskType.no_mask)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers)


def _layer(norm: type, mask: AttnMaskType) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedCoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )

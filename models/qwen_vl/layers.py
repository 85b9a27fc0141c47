"""Layer specs.

Megatron-core's transformer layers with our norm and our packed core attention plugged in.
"""

from triptych.configs.model_schema import VisionConfig, VisionNorm
from triptych.models.activations import SwiGLU
from triptych.models.attention import PackedCoreAttention
from triptych.models.kernels import Kernel, KernelTable
from triptych.models.linear import OverlappedColumnParallelLinear, OverlappedRowParallelLinear
from triptych.models.norm import LayerNorm, LigerRMSNorm, RMSNorm
from triptych.models.rotary import TurningSelfAttention

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


def language_block(
    num_layers: int, table: KernelTable, *, overlap_tp_comm: bool
) -> TransformerBlockSubmodules:
    """``num_layers`` causal decoder layers and a final RMSNorm."""
    norm = _rms_norm(table)
    layer = _layer(norm, _swiglu(table), AttnMaskType.causal, table, overlap_tp_comm)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def vision_block(
    config: VisionConfig, table: KernelTable, *, overlap_tp_comm: bool
) -> TransformerBlockSubmodules:
    """The ViT's layers, which look both ways within a frame or a window; no final norm."""
    norm = LayerNorm if config.norm is VisionNorm.layernorm else _rms_norm(table)
    activation = _swiglu(table) if config.is_gated else None  # None: transformer_configs.py has it
    whole, windowed = (
        _layer(norm, activation, AttnMaskType.no_mask, table, overlap_tp_comm, sees_windows=windows)
        for windows in (False, True)
    )
    layers = [windowed if config.sees_windows(i) else whole for i in range(config.depth)]
    return TransformerBlockSubmodules(layer_specs=layers)


def _rms_norm(table: KernelTable) -> type[RMSNorm]:
    return LigerRMSNorm if table.rms_norm.kernel is Kernel.LIGER else RMSNorm


def _swiglu(table: KernelTable) -> ModuleSpec:
    compiled = table.activation.kernel is Kernel.COMPILED
    return ModuleSpec(module=SwiGLU, params={"compiled": compiled})


def _layer(
    norm: type,
    activation: ModuleSpec | None,
    mask: AttnMaskType,
    table: KernelTable,
    overlap_tp_comm: bool,
    *,
    sees_windows: bool = False,
) -> ModuleSpec:
    column = OverlappedColumnParallelLinear if overlap_tp_comm else ColumnParallelLinear
    row = OverlappedRowParallelLinear if overlap_tp_comm else RowParallelLinear
    fused_rotary = table.rotary.kernel is Kernel.TRANSFORMER_ENGINE
    attention = ModuleSpec(
        module=SelfAttention if fused_rotary else TurningSelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=ModuleSpec(
                module=PackedCoreAttention,
                params={"kernel": table.attention.kernel, "sees_windows": sees_windows},
            ),
            linear_proj=row,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=column,
            activation_func=activation,
            linear_fc2=row,
        ),
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

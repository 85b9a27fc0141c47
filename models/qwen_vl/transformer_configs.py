"""megatron-core's configuration of the two towers."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from triptych.configs.model_schema import LanguageConfig, VisionConfig, VisionNorm
from triptych.configs.schema import ParallelConfig, Precision, Recompute
from triptych.models.activations import quick_gelu
from triptych.models.kernels import Kernel, KernelTable
from triptych.parallel.device import is_deterministic
from triptych.parallel.dtypes import DTYPES

from megatron.core.transformer.transformer_config import TransformerConfig

NORMALIZATIONS = {VisionNorm.layernorm: "LayerNorm", VisionNorm.rmsnorm: "RMSNorm"}


def language_transformer(
    config: LanguageConfig,
    parallel: ParallelConfig,
    precision: Precision,
    layers_per_chunk: Sequence[int],
    table: KernelTable,
) -> TransformerConfig:
    """Qwen2: GQA with bias on QKV only, RMSNorm, SwiGLU, M-RoPE."""
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # megatron-core's word for: call the layer spec's, SwiGLU
        add_bias_linear=False,
        add_qkv_bias=True,
        mrope_section=list(config.mrope_section),
        pipeline_model_parallel_size=parallel.pp,
        pipeline_model_parallel_layout=_pipeline_layout(layers_per_chunk),
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # asked for wherever lengths vary, experts or not
        # interleaved, batched messages give wrong numbers without an error (docs/adr/0007)
        batch_p2p_comm=parallel.vpp == 1,
        batch_p2p_sync=False,  # for a torch older than this needs; waits after every message
        overlap_p2p_comm=parallel.vpp > 1,
        overlap_p2p_comm_warmup_flush=parallel.overlap.p2p,
        # interleaved, megatron-core frees an output that may still be on its way to the next stage
        deallocate_pipeline_outputs=parallel.vpp == 1,
        calculate_per_token_loss=True,
        **_common(parallel, precision, table),
        **_recompute(parallel.recompute.llm, parallel.recompute.modules),
    )


def vision_transformer(
    config: VisionConfig, parallel: ParallelConfig, precision: Precision, table: KernelTable
) -> TransformerConfig:
    """The ViT: biases everywhere; lives whole in the first chunk. Layer specs have the norm."""
    return TransformerConfig(
        num_layers=config.depth,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        ffn_hidden_size=config.intermediate_size,
        normalization=NORMALIZATIONS[config.norm],
        layernorm_epsilon=1e-6,
        **_vision_activation(config, table),
        add_bias_linear=True,
        add_qkv_bias=True,
        **_common(parallel, precision, table),
        **_recompute(parallel.recompute.vit, []),
    )


def _vision_activation(config: VisionConfig, table: KernelTable) -> dict[str, Any]:
    if config.is_gated:
        return dict(gated_linear_unit=True, activation_func=F.silu, use_te_activation_func=True)
    compiled = table.activation.kernel is Kernel.COMPILED
    return dict(activation_func=quick_gelu(compiled=compiled))


def _common(parallel: ParallelConfig, precision: Precision, table: KernelTable) -> dict[str, Any]:
    dtype = DTYPES[precision]
    return dict(
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision is Precision.bf16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=table.rotary.kernel is Kernel.TRANSFORMER_ENGINE,
        gradient_accumulation_fusion=False,
        deterministic_mode=is_deterministic(),
        cuda_graph_scope=[],  # its default warns
        use_cpu_initialization=True,
        perform_initialization=False,  # models/init.py draws weights, the same in every layout
    )


def _recompute(choice: Recompute, modules: list[str]) -> dict[str, Any]:
    if choice is Recompute.none:
        return {}
    if choice is Recompute.selective:
        return dict(recompute_granularity="selective", recompute_modules=modules)
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def _pipeline_layout(layers_per_chunk: Sequence[int]) -> list[list[str]] | None:
    if len(layers_per_chunk) == 1:
        return None
    stages = [["decoder"] * count for count in layers_per_chunk]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]

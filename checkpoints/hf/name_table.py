"""The name table of Qwen2-VL: each of our parameters, and what Hugging Face tensors make it up."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from triptych.checkpoints.hf.transforms import (
    Flatten,
    GateUp,
    GroupedQKV,
    Same,
    Transform,
    VisionQKV,
)
from triptych.configs.model_schema import COLOURS, LanguageConfig, ModelConfig, VisionConfig
from triptych.models.init import EMBEDDING, HEAD
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import TensorSharding

TensorShape = tuple[int, ...]
Row = tuple[str, dict[str, TensorShape], Transform]
"""Our name; their names with full shapes; how the one is made of the others."""

HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Entry:
    """One of our parameters, at its full size (tp = 1)."""

    theirs: dict[str, TensorShape]
    """Full shapes by Hugging Face name, in the order that the transform takes them."""
    transform: Transform
    shape: TensorShape
    sharding: TensorSharding
    """How tp shards ours."""
    exported: bool
    """False for the copy of a tied embedding that the last pipeline stage holds."""


def name_table(model: ModelConfig) -> dict[str, Entry]:
    """Every parameter of the model by its global name (layers counted over all pipeline stages).

    With tied embeddings, ``language.output_layer.weight`` is there too: the last stage's copy under
    pipeline parallelism, read from the embedding and never exported.
    """
    return entries(
        [*vision_rows(model.vision), *_merger(model), *language_rows(model.language)], model
    )


def entries(rows: Iterable[Row], model: ModelConfig) -> dict[str, Entry]:
    """Rows of parameters of the model as entries, by our names."""
    sharding = sharding_table(model)
    return {
        ours: _entry(theirs, how, sharding[ours], exported=not (sharding.tied and ours == HEAD))
        for ours, theirs, how in rows
    }


def hub_name(name: str) -> str:
    """The name that a tensor has on the hub; transformers 5 has a ``model.`` before each tower."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def _entry(
    theirs: dict[str, TensorShape], how: Transform, sharding: TensorSharding, *, exported: bool
) -> Entry:
    on_meta = [torch.empty(shape, device="meta") for shape in theirs.values()]
    return Entry(theirs, how, tuple(how.to_ours(on_meta).shape), sharding, exported)


def vision_rows(config: VisionConfig) -> Iterator[Row]:
    """Patch embedding and layers of the ViT, as Qwen2-VL and Qwen2.5-VL name them."""
    width = config.hidden_size
    kernel = (COLOURS, config.temporal_patch_size, config.patch_size, config.patch_size)
    qkv = VisionQKV(width // config.num_heads)
    name = "visual.patch_embed.proj.weight"
    yield "vision.patch_embed.weight", {name: (width, *kernel)}, Flatten(kernel)
    for i in range(config.depth):
        ours, theirs = f"vision.decoder.layers.{i}", f"visual.blocks.{i}"
        attention, mlp = f"{ours}.self_attention", f"{ours}.mlp"
        yield from _norm(f"{ours}.input_layernorm", f"{theirs}.norm1", config)
        yield from affine(f"{attention}.linear_qkv", f"{theirs}.attn.qkv", (3 * width, width), qkv)
        yield from affine(f"{attention}.linear_proj", f"{theirs}.attn.proj", (width, width))
        yield from _norm(f"{ours}.pre_mlp_layernorm", f"{theirs}.norm2", config)
        yield from _vision_mlp(mlp, f"{theirs}.mlp", config)


def _vision_mlp(ours: str, theirs: str, config: VisionConfig) -> Iterator[Row]:
    """Two linear layers with biases; of a gated MLP, the first one is two of theirs."""
    width, inner = config.hidden_size, config.intermediate_size
    if not config.is_gated:
        yield from affine(f"{ours}.linear_fc1", f"{theirs}.fc1", (inner, width))
        yield from affine(f"{ours}.linear_fc2", f"{theirs}.fc2", (width, inner))
        return
    for leaf, columns in (("weight", (width,)), ("bias", ())):
        gate_up = {f"{theirs}.{x}_proj.{leaf}": (inner, *columns) for x in ("gate", "up")}
        yield f"{ours}.linear_fc1.{leaf}", gate_up, GateUp()
    yield from affine(f"{ours}.linear_fc2", f"{theirs}.down_proj", (width, inner))


def _norm(ours: str, theirs: str, config: VisionConfig) -> Iterator[Row]:
    """A norm of the ViT or the merger: an RMSNorm has no bias."""
    weight, *bias = affine(ours, theirs, (config.hidden_size,))
    yield weight
    if config.norm_has_bias:
        yield from bias


def _merger(model: ModelConfig) -> Iterator[Row]:
    width = model.vision.hidden_size
    merged = width * model.vision.spatial_merge_size**2
    yield from _norm("merger.norm", "visual.merger.ln_q", model.vision)
    yield from affine("merger.fc1", "visual.merger.mlp.0", (merged, merged))
    yield from affine("merger.fc2", "visual.merger.mlp.2", (model.language.hidden_size, merged))


def language_rows(config: LanguageConfig) -> Iterator[Row]:
    """The decoder with embedding and head, as Qwen2 and Qwen2-VL name them."""
    width, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = GroupedQKV(config.num_heads // config.num_kv_heads, config.head_dim)
    yield EMBEDDING, {HF_EMBEDDING: (config.vocab_size, width)}, Same()
    for i in range(config.num_layers):
        ours, theirs = f"language.decoder.layers.{i}", f"model.layers.{i}"
        attention, mlp = f"{ours}.self_attention", f"{ours}.mlp"
        their_attention = f"{theirs}.self_attn"
        qkv_rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        for leaf, columns in (("weight", (width,)), ("bias", ())):
            parts = {f"{their_attention}.{x}.{leaf}": (n, *columns) for x, n in qkv_rows.items()}
            yield f"{attention}.linear_qkv.{leaf}", parts, qkv
        output = f"{their_attention}.o_proj.weight"
        yield f"{attention}.linear_proj.weight", {output: (width, q_rows)}, Same()
        gate, up, down = (f"{theirs}.mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
        gate_up: dict[str, TensorShape] = {gate: (inner, width), up: (inner, width)}
        yield f"{mlp}.linear_fc1.weight", gate_up, GateUp()
        yield f"{mlp}.linear_fc2.weight", {down: (width, inner)}, Same()
        before, between = f"{theirs}.input_layernorm", f"{theirs}.post_attention_layernorm"
        yield f"{ours}.input_layernorm.weight", {f"{before}.weight": (width,)}, Same()
        yield f"{ours}.pre_mlp_layernorm.weight", {f"{between}.weight": (width,)}, Same()
    yield "language.decoder.final_layernorm.weight", {"model.norm.weight": (width,)}, Same()
    head = HF_EMBEDDING if config.tie_word_embeddings else HF_HEAD
    yield HEAD, {head: (config.vocab_size, width)}, Same()


def affine(
    ours: str, theirs: str, shape: TensorShape, how: Transform | None = None
) -> Iterator[Row]:
    """Weight and bias of a linear layer or a LayerNorm."""
    how = how or Same()
    yield f"{ours}.weight", {f"{theirs}.weight": shape}, how
    yield f"{ours}.bias", {f"{theirs}.bias": shape[:1]}, how

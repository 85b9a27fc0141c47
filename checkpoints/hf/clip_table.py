"""The name table of a CLIP ViT, as transformers and as open_clip lay it out.

Our ViT has the same layers: pre-norm, quick GELU, biases. It has neither CLIP's class token nor its
position embedding (rotary positions take its place), and no norm before or after the layers.

Source: transformers modeling_clip.py; open_clip transformer.py, VisionTransformer.
"""

from collections.abc import Iterator

from triptych.checkpoints.hf.name_table import Row, affine
from triptych.checkpoints.hf.transforms import GroupedQKV, SpreadOverFrames, VisionQKV
from triptych.configs.model_schema import COLOURS, VisionConfig

OPEN_CLIP_PATCHES = "visual.conv1.weight"
TRANSFORMERS_PATCHES = "embeddings.patch_embedding.weight"
"""After a prefix that depends on the class that was saved."""

OPEN_CLIP_DROPPED = {
    "visual.class_embedding": "no class token",
    "visual.positional_embedding": "positions are rotary",
    "visual.ln_pre.": "no norm before the layers",
    "visual.ln_post.": "no norm after the layers",
    "visual.proj": "the merger takes its place",
}
TRANSFORMERS_DROPPED = {
    "embeddings.class_embedding": "no class token",
    "embeddings.position_": "positions are rotary",
    "pre_layrnorm.": "no norm before the layers",
    "post_layernorm.": "no norm after the layers",
}
"""Beginning of a name -> why our ViT does not have it."""


def open_clip_rows(config: VisionConfig) -> Iterator[Row]:
    """Rows of open_clip's ``VisionTransformer``; q, k and v are one matrix."""
    width, inner = config.hidden_size, config.intermediate_size
    qkv = VisionQKV(width // config.num_heads)
    yield _patch_embedding(OPEN_CLIP_PATCHES, config)
    for i in range(config.depth):
        ours, theirs = f"vision.decoder.layers.{i}", f"visual.transformer.resblocks.{i}"
        attention = f"{ours}.self_attention"
        yield from affine(f"{ours}.input_layernorm", f"{theirs}.ln_1", (width,))
        for leaf, columns in (("weight", (width,)), ("bias", ())):
            rows = {f"{theirs}.attn.in_proj_{leaf}": (3 * width, *columns)}
            yield f"{attention}.linear_qkv.{leaf}", rows, qkv
        yield from affine(f"{attention}.linear_proj", f"{theirs}.attn.out_proj", (width, width))
        yield from affine(f"{ours}.pre_mlp_layernorm", f"{theirs}.ln_2", (width,))
        yield from affine(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.c_fc", (inner, width))
        yield from affine(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.c_proj", (width, inner))


def transformers_rows(config: VisionConfig, prefix: str) -> Iterator[Row]:
    """Rows of transformers' ``CLIPVisionModel``, below ``prefix``; q, k and v are three."""
    width, inner = config.hidden_size, config.intermediate_size
    qkv = GroupedQKV(1, width // config.num_heads)
    yield _patch_embedding(f"{prefix}{TRANSFORMERS_PATCHES}", config)
    for i in range(config.depth):
        ours, theirs = f"vision.decoder.layers.{i}", f"{prefix}encoder.layers.{i}"
        attention = f"{ours}.self_attention"
        yield from affine(f"{ours}.input_layernorm", f"{theirs}.layer_norm1", (width,))
        for leaf, columns in (("weight", (width,)), ("bias", ())):
            parts = {f"{theirs}.self_attn.{x}_proj.{leaf}": (width, *columns) for x in "qkv"}
            yield f"{attention}.linear_qkv.{leaf}", parts, qkv
        yield from affine(
            f"{attention}.linear_proj", f"{theirs}.self_attn.out_proj", (width, width)
        )
        yield from affine(f"{ours}.pre_mlp_layernorm", f"{theirs}.layer_norm2", (width,))
        yield from affine(f"{ours}.mlp.linear_fc1", f"{theirs}.mlp.fc1", (inner, width))
        yield from affine(f"{ours}.mlp.linear_fc2", f"{theirs}.mlp.fc2", (width, inner))


def _patch_embedding(theirs: str, config: VisionConfig) -> Row:
    patch = config.patch_size
    spread = SpreadOverFrames((COLOURS, config.temporal_patch_size, patch, patch))
    shape = (config.hidden_size, COLOURS, patch, patch)
    return "vision.patch_embed.weight", {theirs: shape}, spread

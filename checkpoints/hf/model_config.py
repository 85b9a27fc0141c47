"""Sizes from and to the ``config.json`` of a Hugging Face Qwen2-VL folder.

Two forms are read: the flat one of the hub (``rope_scaling`` beside ``hidden_size``) and the nested
one that transformers 5 writes (``text_config`` with ``rope_parameters``). The flat one is written:
every version of transformers that knows Qwen2-VL loads it.
"""

from math import ceil
from pathlib import Path
from typing import Any

from triptych.checkpoints.hf.tensor_files import read_json
from triptych.configs.model_schema import (
    COLOURS,
    LanguageConfig,
    ModelConfig,
    TokensConfig,
    VisionConfig,
    VisionMLP,
    VisionNorm,
)
from triptych.data.media.normalize import CLIP_MEAN, CLIP_STD
from triptych.data.tokenizer import load_tokenizer
from triptych.data.types import PixelLimits, VideoLimits
from triptych.errors import CheckpointError

Json = dict[str, Any]


# What a key means where it is absent: transformers 4 leaves out values equal to its class defaults.
# Source: transformers configuration_qwen2_vl.py.
_TEXT_DEFAULTS: Json = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
}
_VISION_DEFAULTS: Json = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "hidden_act": "quick_gelu",
}
_VISION_TOKENS = {
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
    "image_pad": "image_token_id",
    "video_pad": "video_token_id",
}


def model_config_from_hf(folder: Path) -> ModelConfig:
    """The model that a folder holds, named after the folder.

    Ids of the vision tokens come from ``config.json``, those of the text tokens from the folder's
    tokenizer; a folder without one keeps the ids of the Qwen2 vocabulary.

    Raises:
        CheckpointError: no Qwen2-VL, or one with features that this project lacks; lists all.
        ConfigError: the folder's tokenizer lacks special tokens of Qwen2-VL.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "qwen2_vl":
        raise CheckpointError(f"{path}: model_type={raw.get('model_type')!r}, known is 'qwen2_vl'")
    text = _TEXT_DEFAULTS | (raw.get("text_config") or raw)
    vision = _VISION_DEFAULTS | raw.get("vision_config", {})
    rope: Json = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if problems := _unsupported(raw, text, vision, rope):
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{path} asks for what Triptych does not have:\n  {lines}")
    tied = raw.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    return ModelConfig(
        name=folder.resolve().name,
        vision=VisionConfig(
            depth=vision["depth"],
            hidden_size=vision["embed_dim"],
            num_heads=vision["num_heads"],
            intermediate_size=int(vision["embed_dim"] * vision["mlp_ratio"]),
            patch_size=vision["patch_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            spatial_merge_size=vision["spatial_merge_size"],
        ),
        language=LanguageConfig(
            hidden_size=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text["hidden_size"] // text["num_attention_heads"],
            intermediate_size=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            tie_word_embeddings=tied,
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", text["rope_theta"])),
            mrope_section=list(rope["mrope_section"]),
            max_position_embeddings=text["max_position_embeddings"],
        ),
        tokens=_tokens(folder, raw),
    )


def hf_config(model: ModelConfig) -> Json:
    """The ``config.json`` of a model, in the flat form of the hub.

    Raises:
        CheckpointError: transformers' Qwen2-VL cannot have these sizes.
    """
    vision, language, tokens = model.vision, model.language, model.tokens
    if language.head_dim * language.num_heads != language.hidden_size:
        raise CheckpointError(
            f"transformers' Qwen2-VL has head_dim = hidden_size / num_heads; model.language has "
            f"head_dim={language.head_dim}, {language.hidden_size} / {language.num_heads}"
        )
    described = vision.norm, vision.mlp, vision.window_size
    if described != (VisionNorm.layernorm, VisionMLP.quick_gelu, 0):
        raise CheckpointError(
            "transformers' Qwen2-VL has norm=layernorm, mlp=quick_gelu and no windows; "
            f"model.vision has norm={vision.norm.name}, mlp={vision.mlp.name} and "
            f"window_size={vision.window_size}"
        )
    if vision.intermediate_size % vision.hidden_size:
        raise CheckpointError(
            f"transformers' Qwen2-VL has a whole mlp_ratio; model.vision has intermediate_size / "
            f"hidden_size = {vision.intermediate_size} / {vision.hidden_size}"
        )
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "intermediate_size": language.intermediate_size,
        "vocab_size": language.vocab_size,
        "max_position_embeddings": language.max_position_embeddings,
        "max_window_layers": language.num_layers,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rms_norm_eps": language.rms_norm_eps,
        "rope_theta": language.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(language.mrope_section)},
        "tie_word_embeddings": language.tie_word_embeddings,
        "bos_token_id": tokens.endoftext,
        "eos_token_id": tokens.im_end,
        **{key: getattr(tokens, name) for name, key in _VISION_TOKENS.items()},
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": vision.depth,
            "embed_dim": vision.hidden_size,
            "hidden_size": language.hidden_size,
            "hidden_act": "quick_gelu",
            "num_heads": vision.num_heads,
            "mlp_ratio": vision.intermediate_size // vision.hidden_size,
            "in_channels": COLOURS,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        },
    }


def generation_config(model: ModelConfig) -> Json:
    """The ``generation_config.json``: greedy, ending at either end token."""
    tokens = model.tokens
    return {
        "bos_token_id": tokens.endoftext,
        "eos_token_id": [tokens.im_end, tokens.endoftext],
        "pad_token_id": tokens.endoftext,
        "do_sample": False,
    }


def preprocessor_config(model: ModelConfig, limits: PixelLimits) -> Json:
    """The ``preprocessor_config.json``, both spellings of the limits in it."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
        "size": {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
        "patch_size": model.vision.patch_size,
        "temporal_patch_size": model.vision.temporal_patch_size,
        "merge_size": model.vision.spatial_merge_size,
    }


def video_preprocessor_config(model: ModelConfig, limits: VideoLimits) -> Json:
    """The ``video_preprocessor_config.json``, without which images' limits hold for each frame.

    transformers shares out 0.9 of ``max_video_tokens`` among the frames. What it cannot say is that
    this share goes before the least size of a frame.
    """
    return {
        **preprocessor_config(model, PixelLimits(limits.min_pixels, limits.max_pixels)),
        "image_processor_type": "Qwen2VLImageProcessor",
        "video_processor_type": "Qwen2VLVideoProcessor",
        "do_sample_frames": True,
        "fps": limits.fps,
        "min_frames": limits.min_frames,
        "max_frames": limits.max_frames,
        "cap_pixels_per_frame": True,
        "max_video_tokens": ceil(limits.max_tokens / 0.9),
    }


def _unsupported(raw: Json, text: Json, vision: Json, rope: Json) -> list[str]:
    """Every feature of a configuration that this project's Qwen2-VL does not have."""
    rope_type = rope.get("rope_type", rope.get("type"))
    vision_rope = vision.get("rope_parameters") or {}
    width, heads, kv_heads = (
        text[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    channels = vision.get("in_channels", vision.get("in_chans", COLOURS))
    expectations = [
        ("rope type", rope_type, ("mrope", "default")),
        ("mrope_section", "given" if "mrope_section" in rope else "missing", ("given",)),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ("hidden_act", text["hidden_act"], ("silu",)),
        ("use_sliding_window", text.get("use_sliding_window") or False, (False,)),
        ("attention_dropout", text.get("attention_dropout") or 0.0, (0.0,)),
        ("quantization_config", "given" if "quantization_config" in raw else "none", ("none",)),
        ("vision_config.hidden_act", vision["hidden_act"], ("quick_gelu",)),
        ("vision_config.in_channels", channels, (COLOURS,)),
        ("vision_config.hidden_size", vision["hidden_size"], (width,)),
        ("vision_config rope_theta", vision_rope.get("rope_theta", 10000.0), (10000.0,)),
        ("hidden_size % num_attention_heads", width % heads, (0,)),
        ("num_attention_heads % num_key_value_heads", heads % kv_heads, (0,)),
    ]
    return [
        f"{name}={value!r}; known is {' or '.join(repr(x) for x in known)}"
        for name, value, known in expectations
        if value not in known
    ]


def _tokens(folder: Path, raw: Json) -> TokensConfig:
    """Ids of the special tokens, from ``config.json`` and the tokenizer.

    Raises:
        CheckpointError: the two disagree.
    """
    tokens = TokensConfig()
    for name, key in _VISION_TOKENS.items():
        setattr(tokens, name, raw.get(key, getattr(tokens, name)))
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return tokens
    of_tokenizer = load_tokenizer(folder).tokens
    problems = [
        f"<|{name}|> is {getattr(of_tokenizer, name)} in the tokenizer, "
        f"{key}={getattr(tokens, name)} in config.json"
        for name, key in _VISION_TOKENS.items()
        if getattr(of_tokenizer, name) != getattr(tokens, name)
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{folder} contradicts itself:\n  {lines}")
    return of_tokenizer

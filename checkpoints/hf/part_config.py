"""Whether the configuration of a folder describes the part of our model that it is to fill.

Sizes, and what no tensor shows: numbers of heads, activations, rotary base, epsilon, windows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triptych.checkpoints.hf.tensor_files import read_json
from triptych.configs.model_schema import LanguageConfig, VisionConfig, VisionMLP, VisionNorm

Json = dict[str, Any]

# What a key means where it is absent. Source: transformers configuration_qwen2.py,
# configuration_clip.py.
_QWEN2_DEFAULTS: Json = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "hidden_act": "silu",
}
_CLIP_DEFAULTS: Json = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
}
_ACTIVATIONS = {"quick_gelu": VisionMLP.quick_gelu, "silu": VisionMLP.swiglu}


def language_differences(folder: Path, model: LanguageConfig) -> list[str]:
    """How the Qwen2 or Qwen2.5 text model of a folder differs from ``model.language``.

    Its number of tokens may be another one.

    Raises:
        CheckpointError: there is no config.json.
    """
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "qwen2":
        return [f"model_type={raw.get('model_type')!r}; known is 'qwen2', of Qwen2 and Qwen2.5"]
    text = _QWEN2_DEFAULTS | raw
    rope: Json = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = {
        "hidden_size": text["hidden_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "num_kv_heads": text["num_key_value_heads"],
        "head_dim": text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        "intermediate_size": text["intermediate_size"],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "rms_norm_eps": text["rms_norm_eps"],
        "rope_theta": float(rope.get("rope_theta", text["rope_theta"])),
    }
    expected = [
        ("hidden_act", text["hidden_act"], "silu"),
        ("use_sliding_window", text["use_sliding_window"], False),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), "default"),
    ]
    return [
        *_differences("model.language", found, model),
        *(
            f"{key}={value!r}; known is {known!r}"
            for key, value, known in expected
            if value != known
        ),
    ]


def qwen_tower_differences(folder: Path, model: VisionConfig) -> list[str]:
    """How the tower of a Qwen2-VL or Qwen2.5-VL folder differs from ``model.vision``.

    Raises:
        CheckpointError: there is no config.json.
    """
    raw = read_json(folder / "config.json")
    kind, vision = raw.get("model_type"), raw.get("vision_config", {})
    if kind not in ("qwen2_vl", "qwen2_5_vl"):
        return [f"model_type={kind!r}; known are 'qwen2_vl' and 'qwen2_5_vl'"]
    common = {
        "depth": vision.get("depth", 32),
        "num_heads": vision.get("num_heads", 16),
        "patch_size": vision.get("patch_size", 14),
        "temporal_patch_size": vision.get("temporal_patch_size", 2),
        "spatial_merge_size": vision.get("spatial_merge_size", 2),
    }
    if kind == "qwen2_vl":
        width = vision.get("embed_dim", 1280)
        found = common | {
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4)),
            "norm": VisionNorm.layernorm,
            "mlp": _ACTIVATIONS.get(vision.get("hidden_act", "quick_gelu")),
            "window_size": 0,
        }
    else:
        found = common | {
            "hidden_size": vision.get("hidden_size", 1280),
            "intermediate_size": vision.get("intermediate_size", 3420),
            "norm": VisionNorm.rmsnorm,
            "mlp": _ACTIVATIONS.get(vision.get("hidden_act", "silu")),
            "window_size": vision.get("window_size", 112),
            "full_attention_layers": vision.get("fullatt_block_indexes", [7, 15, 23, 31]),
        }
    return list(_differences("model.vision", found, model))


def clip_differences(folder: Path, model: VisionConfig) -> list[str]:
    """How the ViT of a CLIP folder of transformers differs from ``model.vision``.

    Raises:
        CheckpointError: there is no config.json.
    """
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in ("clip", "clip_vision_model"):
        return [f"model_type={raw.get('model_type')!r}; known are 'clip' and 'clip_vision_model'"]
    vision = _CLIP_DEFAULTS | (raw.get("vision_config") or raw)
    found = {
        "depth": vision["num_hidden_layers"],
        "hidden_size": vision["hidden_size"],
        "num_heads": vision["num_attention_heads"],
        "intermediate_size": vision["intermediate_size"],
        "patch_size": vision["patch_size"],
        "norm": VisionNorm.layernorm,
        "mlp": _ACTIVATIONS.get(vision["hidden_act"], vision["hidden_act"]),
    }
    return list(_differences("model.vision", found, model))


def open_clip_differences(folder: Path, model: VisionConfig) -> list[str]:
    """How the ViT of an open_clip folder differs from ``model.vision``.

    Raises:
        CheckpointError: there is no open_clip_config.json, which alone says how many heads it has.
    """
    raw = read_json(folder / "open_clip_config.json")["model_cfg"]
    vision = raw["vision_cfg"]
    if not isinstance(vision.get("layers"), int) or "timm_model_name" in vision:
        return ["the vision tower is no ViT of open_clip's own"]
    found = {
        "depth": vision["layers"],
        "hidden_size": vision["width"],
        "num_heads": vision["width"] // vision.get("head_width", 64),
        "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
        "patch_size": vision["patch_size"],
        "norm": VisionNorm.layernorm,
        "mlp": VisionMLP.quick_gelu if raw.get("quick_gelu") else "gelu",
    }
    return list(_differences("model.vision", found, model))


def _differences(group: str, found: Json, model: LanguageConfig | VisionConfig) -> Iterator[str]:
    """Of the keys that the folder determines, those in which the model is another."""
    for key, value in found.items():
        ours = getattr(model, key)
        if ours != value:
            shown, own = (getattr(x, "name", x) for x in (value, ours))
            yield f"{group}.{key}={own}, the folder has {shown}"

"""Small folders in the forms in which language models and ViTs are published."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from triptych.configs.model_schema import LanguageConfig, VisionConfig
from triptych.tests.helpers.reference import perturb

IMAGE_SIZE = 56
"""Pixels; gives CLIP a position embedding of 16 patches and a class token."""


def clip_vit(vision: VisionConfig, *, eps: float = 1e-6, activation: str = "quick_gelu") -> Any:
    """transformers' CLIPVisionModel of a ViT's sizes, with perturbed random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.depth,
        num_attention_heads=vision.num_heads,
        patch_size=vision.patch_size,
        image_size=IMAGE_SIZE,
        hidden_act=activation,
        layer_norm_eps=eps,
    )
    model = CLIPVisionModel(config).eval()
    perturb(model, seed=5)
    return model


def save_clip_model(model: Any, folder: Path) -> Path:
    """As the hub has CLIP: a pickle, its text tower beside the ViT."""
    folder.mkdir()
    state = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)  # older versions saved it
    state["text_model.final_layer_norm.weight"] = torch.ones(8)
    state["logit_scale"] = torch.tensor(1.0)
    torch.save(state, folder / "pytorch_model.bin")
    config = {"model_type": "clip", "vision_config": model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_open_clip(model: Any, folder: Path) -> Path:
    """The same ViT under the names and in the shapes of open_clip.

    Written from open_clip's public source (transformer.py); open_clip itself is not installed.
    """
    folder.mkdir()
    theirs, config = model.state_dict(), model.config
    state: dict[str, Tensor] = {
        "visual.class_embedding": theirs["embeddings.class_embedding"],
        "visual.positional_embedding": theirs["embeddings.position_embedding.weight"],
        "visual.conv1.weight": theirs["embeddings.patch_embedding.weight"],
        "visual.proj": torch.ones(config.hidden_size, 8),
        "text_projection": torch.ones(8, 8),
        "transformer.resblocks.0.ln_1.weight": torch.ones(8),
    }
    for leaf in ("weight", "bias"):
        state[f"visual.ln_pre.{leaf}"] = theirs[f"pre_layrnorm.{leaf}"]
        state[f"visual.ln_post.{leaf}"] = theirs[f"post_layernorm.{leaf}"]
        for i in range(config.num_hidden_layers):
            ours, layer = f"visual.transformer.resblocks.{i}", f"encoder.layers.{i}"
            qkv = [theirs[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            state[f"{ours}.attn.in_proj_{leaf}"] = torch.cat(qkv)
            names = {
                "attn.out_proj": "self_attn.out_proj",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }
            for name, other in names.items():
                state[f"{ours}.{name}.{leaf}"] = theirs[f"{layer}.{other}.{leaf}"]
    save_file(
        {name: x.contiguous() for name, x in state.items()}, folder / "open_clip_model.safetensors"
    )
    vision = {
        "image_size": IMAGE_SIZE,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "patch_size": config.patch_size,
    }
    quick = config.hidden_act == "quick_gelu"
    content = {"model_cfg": {"embed_dim": 8, "quick_gelu": quick, "vision_cfg": vision}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def qwen2(language: LanguageConfig, **changes: Any) -> nn.Module:
    """transformers' Qwen2 text model of a decoder's sizes, with perturbed random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "intermediate_size": language.intermediate_size,
        "vocab_size": language.vocab_size,
        "rms_norm_eps": language.rms_norm_eps,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": language.tie_word_embeddings,
        "max_position_embeddings": 4096,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**sizes | changes))
    perturb(model, seed=6)
    return model


def qwen2_5_vl(vision: VisionConfig) -> nn.Module:
    """transformers' Qwen2.5-VL around a tower of these sizes, its language model tiny."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tower = {
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.intermediate_size,
        "out_hidden_size": 32,
        "window_size": vision.window_size,
        "fullatt_block_indexes": list(vision.full_attention_layers),
    }
    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=tower, text_config=text)
    )
    perturb(model, seed=7)
    return model

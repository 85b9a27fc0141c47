"""The sizes of the two towers, and the special tokens."""

from collections.abc import Iterator
from dataclasses import asdict
from math import gcd

from triptych.configs.model_schema import VisionConfig
from triptych.configs.problems import Problem, typed_list
from triptych.configs.schema import Config


def check_model(config: Config) -> Iterator[Problem]:
    """The sizes of the two towers fit together, and the special tokens fit the vocabulary."""
    vision, language, tokens = config.model.vision, config.model.language, config.model.tokens
    if vision.hidden_size % (4 * vision.num_heads):
        yield Problem(
            f"model.vision.hidden_size={vision.hidden_size} must be a multiple of 4*num_heads ="
            f" {4 * vision.num_heads}, as 2D-RoPE turns pairs along two axes",
            f"model.vision.hidden_size={_round_up(vision.hidden_size, 4 * vision.num_heads)}",
        )
    yield from _check_windows(vision)
    if language.hidden_size != language.num_heads * language.head_dim:
        yield Problem(
            f"model.language.hidden_size={language.hidden_size} must be num_heads*head_dim ="
            f" {language.num_heads}*{language.head_dim}={language.num_heads * language.head_dim}",
            f"model.language.hidden_size={language.num_heads * language.head_dim}",
        )
    for key, default in {"rms_norm_eps": "1e-6", "rope_theta": "1e6"}.items():
        if getattr(language, key) <= 0:
            yield Problem(
                f"model.language.{key}={getattr(language, key)} must be above 0",
                f"model.language.{key}={default}",
            )
    if language.num_heads % language.num_kv_heads:
        yield Problem(
            f"model.language.num_kv_heads={language.num_kv_heads} must divide"
            f" num_heads={language.num_heads}",
            f"model.language.num_kv_heads={gcd(language.num_heads, language.num_kv_heads)}",
        )
    section = language.mrope_section
    if len(section) != 3 or min(section) < 0 or 2 * sum(section) != language.head_dim:
        pairs = language.head_dim // 2
        good = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
        yield Problem(
            f"model.language.mrope_section={typed_list(section)} must be three counts that add up"
            f" to head_dim/2 = {language.head_dim}/2",
            f"model.language.mrope_section={typed_list(good)}",
        )
    ids = {f"model.tokens.{name}": token for name, token in asdict(tokens).items()}
    for key, token in ids.items():
        if not 0 <= token < language.vocab_size:
            yield Problem(
                f"{key}={token} must be below model.language.vocab_size={language.vocab_size}",
                f"the id that the tokenizer gives it, {key}=ID",
            )
    if len(set(ids.values())) < len(ids):
        all_ids = list(ids.values())
        shared = [f"{key}={token}" for key, token in ids.items() if all_ids.count(token) > 1]
        yield Problem(f"{' and '.join(shared)} must differ", "the ids that the tokenizer gives")


def _check_windows(vision: VisionConfig) -> Iterator[Problem]:
    size, token, layers = vision.window_size, vision.resize_factor, vision.full_attention_layers
    if size % token:
        yield Problem(
            f"model.vision.window_size={size} must be a multiple of patch_size*spatial_merge_size ="
            f" {token}, as windows hold whole tokens",
            f"model.vision.window_size={_round_up(size, token)}",
        )
    known = sorted({layer for layer in layers if 0 <= layer < vision.depth})
    if layers != known:
        yield Problem(
            f"model.vision.full_attention_layers={typed_list(layers)} must be different layers from"
            f" 0 to depth-1 = {vision.depth - 1}, in order",
            f"model.vision.full_attention_layers={typed_list(known)}",
        )
    if layers and not size:
        yield Problem(
            f"model.vision.full_attention_layers={typed_list(layers)} sets apart layers without"
            " windows, but model.vision.window_size=0 has none",
            f"model.vision.window_size={4 * token} or model.vision.full_attention_layers=[]",
        )
    if size and len(known) == vision.depth:
        yield Problem(
            f"model.vision.window_size={size} is of no layer: full_attention_layers names all",
            "model.vision.window_size=0 model.vision.full_attention_layers=[]",
        )


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

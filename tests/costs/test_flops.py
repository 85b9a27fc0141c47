"""FLOPs and parameter counts against the released sizes, and against sums done the long way."""

from dataclasses import replace

import pytest

from triptych.configs.model_schema import (
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    VisionMLP,
    VisionNorm,
)
from triptych.costs.flops import (
    NO_WORK,
    Workload,
    forward_flops,
    head_flops,
    layer_flops,
    layer_parameters,
    parameters,
    training_flops,
    vit_flops,
)

QWEN2_VL_2B = ModelConfig(
    name="qwen2_vl_2b",
    language=LanguageConfig(
        hidden_size=1536,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=8960,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
)
QWEN2_VL_7B = ModelConfig(
    name="qwen2_vl_7b",
    language=LanguageConfig(
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        vocab_size=152064,
    ),
)
QWEN2_VL_72B = ModelConfig(
    name="qwen2_vl_72b",
    language=LanguageConfig(
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=29568,
        vocab_size=152064,
    ),
)
MODELS = [QWEN2_VL_2B, QWEN2_VL_7B, QWEN2_VL_72B]
QWEN2_5_VIT = {"norm": VisionNorm.rmsnorm, "mlp": VisionMLP.swiglu}
LOAD = Workload(num_tokens=8192, token_pairs=3 * 2730**2, num_patches=8192, patch_pairs=8 * 1024**2)


@pytest.mark.parametrize(
    ("model", "vision", "total"),
    [
        (QWEN2_VL_2B, 665_271_296, 2_208_985_600),
        (QWEN2_VL_7B, 675_759_104, 8_291_375_616),
        (QWEN2_VL_72B, 699_356_672, 73_405_560_320),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_parameters_equal_the_released_sizes(model, vision, total):
    counts = parameters(model)
    assert counts.vit + counts.adapter == vision
    assert counts.total == total
    assert counts.layers == model.language.num_layers * layer_parameters(model.language)
    assert (counts.head == 0) == model.language.tie_word_embeddings


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_without_attention_a_token_costs_two_flops_per_weight(model):
    """Norms and biases are vectors: under 0.1 % of the parameters."""
    counts = parameters(model)
    flops = forward_flops(model, Workload(1, 0, 4, 0, num_supervised_tokens=1))
    assert flops.layers.total == pytest.approx(2 * counts.layers, rel=1e-3)
    assert flops.head.total == 2 * counts.embedding
    assert flops.vit.total == pytest.approx(4 * 2 * counts.vit, rel=1e-3)
    assert flops.adapter.total == pytest.approx(2 * counts.adapter, rel=1e-3)


def test_attention_counts_scores_and_values_of_every_visible_pair():
    language = QWEN2_VL_7B.language
    length = 512
    visible = length**2 / 2
    per_pair = 2 * 2 * language.num_heads * language.head_dim
    assert layer_flops(language, Workload(length, length**2, 0, 0)).attention == visible * per_pair

    vision = QWEN2_VL_7B.vision
    frames, patches = 3, 256
    flops = forward_flops(
        QWEN2_VL_7B, Workload(0, 0, frames * patches, frames * patches**2)
    ).vit.attention
    assert flops == vision.depth * frames * patches**2 * 2 * 2 * vision.hidden_size


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_flops_add_up_over_packs(model):
    half = Workload(4096, 2 * 2048**2, 4096, 4 * 1024**2)
    whole = Workload(8192, 4 * 2048**2, 8192, 8 * 1024**2)
    assert forward_flops(model, whole).total == pytest.approx(2 * forward_flops(model, half).total)


def test_only_supervised_tokens_have_logits():
    language = QWEN2_VL_7B.language
    per_token = 2 * language.hidden_size * language.vocab_size
    text_and_image = Workload(100, 0, 4 * 60, 0)
    assert head_flops(QWEN2_VL_7B, text_and_image).total == (100 - 60) * per_token
    answers = replace(text_and_image, num_supervised_tokens=7)
    assert head_flops(QWEN2_VL_7B, answers).total == 7 * per_token


def test_everything_trained_costs_three_forward_passes():
    forward = forward_flops(QWEN2_VL_2B, LOAD)
    assert training_flops(QWEN2_VL_2B, LOAD, vit=True, adapter=True, llm=True) == pytest.approx(
        3 * forward.total
    )


def test_what_is_frozen_costs_less():
    forward = forward_flops(QWEN2_VL_2B, LOAD)
    stage_1 = training_flops(QWEN2_VL_2B, LOAD, vit=True, adapter=True, llm=False)
    llm_linear = forward.layers.linear + forward.head.linear
    assert stage_1 == pytest.approx(3 * forward.total - llm_linear)
    stage_3 = training_flops(QWEN2_VL_2B, LOAD, vit=False, adapter=True, llm=True)
    assert stage_3 == pytest.approx(3 * forward.total - 2 * forward.vit.total)
    nothing = training_flops(QWEN2_VL_2B, LOAD, vit=False, adapter=False, llm=False)
    assert nothing == pytest.approx(forward.total)


def test_workloads_add_up():
    first, second = (
        Workload(5, 25, 8, 64, num_supervised_tokens=2),
        Workload(3, 9, 4, 16, num_supervised_tokens=3),
    )
    assert first + second == Workload(8, 34, 12, 80, num_supervised_tokens=5)
    assert sum([first, second], NO_WORK) == first + second
    assert (first + replace(second, num_supervised_tokens=None)).num_supervised_tokens is None


@pytest.mark.parametrize(
    ("model", "intermediate_size", "vision"),
    [(QWEN2_VL_7B, 3420, 676_550_144), (QWEN2_VL_72B, 3456, 704_573_696)],
    ids=["7B", "72B"],
)
def test_a_vit_with_rmsnorm_and_gated_mlps_is_as_large_as_qwen2_5s(
    model: ModelConfig, intermediate_size: int, vision: int
) -> None:
    tower = VisionConfig(intermediate_size=intermediate_size, **QWEN2_5_VIT)
    counted = parameters(replace(model, vision=tower))
    assert counted.vit + counted.adapter == vision


def test_a_gated_mlp_costs_half_as_much_again() -> None:
    """Per patch and layer: 6 E F FLOPs where a plain one has 4 E F."""
    gated = VisionConfig(mlp=VisionMLP.swiglu)
    more = vit_flops(gated, LOAD).linear - vit_flops(VisionConfig(), LOAD).linear
    assert more == 2 * 1280 * 5120 * LOAD.num_patches * gated.depth
    assert vit_flops(gated, LOAD).attention == vit_flops(VisionConfig(), LOAD).attention


def test_windows_cost_their_own_pairs() -> None:
    """Of 448 x 448 pixels: 16 windows of 8 x 8 patches in 28 of 32 layers."""
    windowed = VisionConfig(window_size=112, full_attention_layers=[7, 15, 23, 31])
    image = Workload(num_tokens=256, token_pairs=256**2, num_patches=1024, patch_pairs=1024**2)
    cost = vit_flops(windowed, image)
    assert cost.attention == 4 * 1280 * (4 * 1024**2 + 28 * 16 * 64**2)
    assert cost.linear == vit_flops(VisionConfig(), image).linear

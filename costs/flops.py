"""FLOPs and parameters of a model: the only place where such a formula stands. Imports no torch.

One multiply-add is 2 FLOPs. Matrix multiplications only: norms, activations and rotary angles are
left out, as is recomputation (these are model FLOPs, not hardware FLOPs).

    E, F   ViT hidden and MLP size
    h, f   LLM hidden and MLP size
    q, kv  width of all query heads, of all key (or value) heads
"""

from dataclasses import dataclass, fields

from triptych.configs.model_schema import LanguageConfig, ModelConfig, VisionConfig
from triptych.configs.schema import StageConfig


@dataclass(frozen=True, slots=True)
class Workload:
    """What the FLOPs of a pack, or of any sum of packs, follow from."""

    num_tokens: int
    """LLM tokens."""
    token_pairs: int
    """Sum over the segments of the squared number of tokens."""
    num_patches: int
    """ViT patches; 0 for text."""
    patch_pairs: int
    """Sum over the frames of the squared number of patches."""
    num_supervised_tokens: int | None = None
    """Tokens that logits and loss are computed of; None: all but those that come from the ViT."""

    def __add__(self, other: "Workload") -> "Workload":
        """Both together; where one does not count supervised tokens, the sum does not either."""
        ours, theirs = self.num_supervised_tokens, other.num_supervised_tokens
        return Workload(
            self.num_tokens + other.num_tokens,
            self.token_pairs + other.token_pairs,
            self.num_patches + other.num_patches,
            self.patch_pairs + other.patch_pairs,
            num_supervised_tokens=None if ours is None or theirs is None else ours + theirs,
        )


NO_WORK = Workload(0, 0, 0, 0, num_supervised_tokens=0)
"""Where a sum of workloads begins."""


@dataclass(frozen=True, slots=True)
class PartFlops:
    """Forward FLOPs of one part, split by how its backward pass costs."""

    linear: float
    """Products with a weight: the gradients of input and weight cost as much again, each."""
    attention: float = 0.0
    """Products of two activations: both gradients are always needed."""

    @property
    def total(self) -> float:
        """All forward FLOPs of the part."""
        return self.linear + self.attention

    def training(self, *, trains: bool, gradient: bool) -> float:
        """Forward and backward FLOPs; ``gradient`` says that a gradient passes through the part."""
        return self.linear * (1 + gradient + trains) + self.attention * (1 + 2 * gradient)


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """Forward FLOPs of a workload."""

    vit: PartFlops
    adapter: PartFlops
    layers: PartFlops
    """All decoder layers."""
    head: PartFlops

    @property
    def total(self) -> float:
        """FLOPs of the whole forward pass."""
        return self.vit.total + self.adapter.total + self.layers.total + self.head.total


def vit_flops(vision: VisionConfig, load: Workload) -> PartFlops:
    """Patch embedding and all layers of the ViT; attention within frames or windows, not causal.

    Windows that an edge of a frame cuts count as whole: attention within windows of 8 x 8 patches
    is a hundredth of its layer, and a workload need not count their pairs.
    """
    hidden = vision.hidden_size
    weights = vision.patch_dim * hidden + vision.depth * _vit_layer_weights(vision)
    pairs = (vision.depth - vision.num_window_layers) * load.patch_pairs
    pairs += vision.num_window_layers * vision.patches_per_window * load.num_patches
    return PartFlops(
        linear=2.0 * weights * load.num_patches,
        attention=4.0 * hidden * pairs,
    )


def adapter_flops(model: ModelConfig, load: Workload) -> PartFlops:
    """The merger: two linear layers per merged token."""
    merged = _merged_dim(model.vision)
    num_merged = load.num_patches / model.vision.patches_per_token
    return PartFlops(linear=2.0 * merged * (merged + model.language.hidden_size) * num_merged)


def layer_flops(language: LanguageConfig, load: Workload) -> PartFlops:
    """One decoder layer; causal attention within each segment, so half of the pairs."""
    return PartFlops(
        linear=2.0 * _decoder_layer_weights(language) * load.num_tokens,
        attention=2.0 * language.num_heads * language.head_dim * load.token_pairs,
    )


def mlp_flops(language: LanguageConfig, load: Workload) -> PartFlops:
    """The gated MLP of one decoder layer, a share of ``layer_flops``."""
    return PartFlops(linear=2.0 * _mlp_weights(language) * load.num_tokens)


def head_flops(model: ModelConfig, load: Workload) -> PartFlops:
    """Logits of the supervised tokens; tied or not, the product is the same."""
    language, num_supervised_tokens = model.language, load.num_supervised_tokens
    if num_supervised_tokens is None:
        num_merged = load.num_patches / model.vision.patches_per_token
        num_logits = load.num_tokens - num_merged
    else:
        num_logits = num_supervised_tokens
    return PartFlops(linear=2.0 * language.hidden_size * language.vocab_size * num_logits)


def forward_flops(model: ModelConfig, load: Workload) -> ForwardFlops:
    """Forward FLOPs of a workload, by part."""
    layer = layer_flops(model.language, load)
    num_layers = model.language.num_layers
    return ForwardFlops(
        vit=vit_flops(model.vision, load),
        adapter=adapter_flops(model, load),
        layers=PartFlops(layer.linear * num_layers, layer.attention * num_layers),
        head=head_flops(model, load),
    )


def training_flops(
    model: ModelConfig, load: Workload, *, vit: bool, adapter: bool, llm: bool
) -> float:
    """Forward and backward FLOPs where only some parts train.

    A gradient passes through a frozen part where something before it trains: a frozen LLM after a
    training ViT still costs its input gradients, a frozen ViT costs its forward pass only.
    """
    forward = forward_flops(model, load)
    in_adapter, in_llm = vit or adapter, vit or adapter or llm
    return (
        forward.vit.training(trains=vit, gradient=vit)
        + forward.adapter.training(trains=adapter, gradient=in_adapter)
        + forward.layers.training(trains=llm, gradient=in_llm)
        + forward.head.training(trains=llm, gradient=in_llm)
    )


def stage_flops(model: ModelConfig, stage: StageConfig, load: Workload) -> float:
    """Forward and backward FLOPs of a workload under what trains in a stage."""
    return training_flops(
        model, load, vit=stage.vit.train, adapter=stage.adapter.train, llm=stage.llm.train
    )


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters, by part."""

    vit: int
    adapter: int
    embedding: int
    layers: int
    """All decoder layers."""
    final_norm: int
    head: int
    """0 where the head is the embedding."""

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(getattr(self, part.name) for part in fields(self))


def layer_parameters(language: LanguageConfig) -> int:
    """One decoder layer: weights, QKV biases, two norms."""
    qkv_bias = (language.num_heads + 2 * language.num_kv_heads) * language.head_dim
    return _decoder_layer_weights(language) + qkv_bias + 2 * language.hidden_size


def parameters(model: ModelConfig) -> Parameters:
    """Parameters of every part.

    Source: equal to the released sizes for 2B, 7B and 72B (tests/costs/test_flops.py).
    """
    vision, language = model.vision, model.language
    hidden, merged = vision.hidden_size, _merged_dim(vision)
    norm = hidden * (1 + vision.norm_has_bias)
    vit_layer_vectors = 4 * hidden + vision.fc1_size + hidden + 2 * norm
    embedding = language.vocab_size * language.hidden_size
    return Parameters(
        vit=vision.patch_dim * hidden
        + vision.depth * (_vit_layer_weights(vision) + vit_layer_vectors),
        adapter=norm + merged * (merged + language.hidden_size) + merged + language.hidden_size,
        embedding=embedding,
        layers=language.num_layers * layer_parameters(language),
        final_norm=language.hidden_size,
        head=0 if language.tie_word_embeddings else embedding,
    )


def _merged_dim(vision: VisionConfig) -> int:
    return vision.hidden_size * vision.patches_per_token


def _vit_layer_weights(vision: VisionConfig) -> int:
    """QKV and output projection 4 E E, MLP 2 E F, or 3 E F where it is gated."""
    mlp = vision.fc1_size + vision.intermediate_size
    return 4 * vision.hidden_size**2 + vision.hidden_size * mlp


def _decoder_layer_weights(language: LanguageConfig) -> int:
    """Query and output 2 h q, key and value 2 h kv, gated MLP 3 h f."""
    query = language.num_heads * language.head_dim
    key = language.num_kv_heads * language.head_dim
    return language.hidden_size * (2 * query + 2 * key) + _mlp_weights(language)


def _mlp_weights(language: LanguageConfig) -> int:
    return 3 * language.hidden_size * language.intermediate_size

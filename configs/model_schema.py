"""What a model is: the ViT, the decoder, and the ids of its special tokens.

Layers, sharding over tp, Hugging Face names, costs and preprocessing read this description; a
checkpoint's ``model.json`` and an exported folder say the same. Nothing here imports torch.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

COLOURS = 3
"""Channels of a picture: red, green and blue, whatever the file has."""


class VisionNorm(Enum):
    """What normalises the rows of the ViT and the merger."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class VisionMLP(Enum):
    """What each layer of the ViT does between its two linear layers."""

    quick_gelu = "quick_gelu"
    """``fc2(quick_gelu(fc1(x)))``."""
    swiglu = "swiglu"
    """Gated: ``down(silu(gate(x)) * up(x))``."""


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    """The ViT, described: layers, sharding, names, costs and preprocessing follow from it.

    The defaults are those of Qwen2-VL, the same in the released 2B, 7B and 72B models. Linear
    layers have biases, but the patch embedding has none.
    """

    depth: int = 32
    """Number of transformer layers."""
    hidden_size: int = 1280
    num_heads: int = 16
    intermediate_size: int = 5120
    """Width between the linear layers of an MLP; a gated one has gate and up of it."""
    norm: VisionNorm = VisionNorm.layernorm
    mlp: VisionMLP = VisionMLP.quick_gelu
    patch_size: int = 14
    """Pixels along each side of a patch."""
    temporal_patch_size: int = 2
    """Frames in a patch; an image is two identical frames."""
    spatial_merge_size: int = 2
    """Patches along each side that the merger joins into one token."""
    window_size: int = 0
    """Pixels along each side of the windows that most layers attend within; 0: all see frames."""
    full_attention_layers: list[int] = field(default_factory=list)
    """Layers, from 0, that see whole frames where the others see windows."""

    @property
    def is_gated(self) -> bool:
        """The MLPs have a gate beside the projection that it opens."""
        return self.mlp is VisionMLP.swiglu

    @property
    def fc1_size(self) -> int:
        """Outputs of an MLP's first linear layer: gate and up together, where it is gated."""
        return self.intermediate_size * (2 if self.is_gated else 1)

    @property
    def norm_has_bias(self) -> bool:
        """The norms of ViT and merger shift, besides scaling."""
        return self.norm is VisionNorm.layernorm

    def sees_windows(self, layer: int) -> bool:
        """A layer, counted from 0, attends within windows."""
        return self.window_size > 0 and layer not in self.full_attention_layers

    @property
    def num_window_layers(self) -> int:
        """Layers that attend within windows."""
        return sum(map(self.sees_windows, range(self.depth)))

    @property
    def patches_per_window(self) -> int:
        """Patches of a window that no edge of a frame cuts."""
        return (self.window_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch, of all its channels and frames."""
        return COLOURS * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """Patches that the merger joins into one token."""
        return self.spatial_merge_size**2

    @property
    def resize_factor(self) -> int:
        """Pixels that both sides of a resized image are multiples of."""
        return self.patch_size * self.spatial_merge_size


@dataclass(kw_only=True, slots=True)
class LanguageConfig:
    """The Qwen2 decoder."""

    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    """``compose.py`` sees to it: hidden_size / num_heads, where no file and no word gives it."""
    intermediate_size: int = MISSING
    vocab_size: int = MISSING
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: list[int] = field(default_factory=lambda: [16, 24, 24])
    """Rotary pairs that follow the time, height and width axis; they add up to head_dim / 2."""
    max_position_embeddings: int = 32768


@dataclass(kw_only=True, slots=True)
class TokensConfig:
    """Ids of the special tokens; defaults are those of the Qwen2 vocabulary."""

    endoftext: int = 151643
    im_start: int = 151644
    im_end: int = 151645
    vision_start: int = 151652
    vision_end: int = 151653
    image_pad: int = 151655
    video_pad: int = 151656


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which model this is."""

    name: str = MISSING
    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)

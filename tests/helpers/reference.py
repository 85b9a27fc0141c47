"""transformers' Qwen2-VL as the reference: small random models, one sample at a time, no packing,
no parallelism.

Weights are drawn at 1/sqrt(fan_in); biases and norm weights are perturbed, so that nothing is zero
or symmetric and a swapped axis or a dropped bias shows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from triptych.checkpoints.hf.model_config import hf_config
from triptych.checkpoints.hf.name_table import hub_name
from triptych.configs.model_schema import (
    LanguageConfig,
    ModelConfig,
    TokensConfig,
    VisionConfig,
    VisionMLP,
    VisionNorm,
)
from triptych.data.media.normalize import CLIP_MEAN, CLIP_STD

PATCH_DIM = VisionConfig().patch_dim
TOKENS = TokensConfig(
    endoftext=0, im_start=1, im_end=2, vision_start=9, vision_end=10, image_pad=12, video_pad=13
)
FIRST_TEXT_TOKEN = 14
MROPE_SECTIONS = {8: [2, 1, 1], 16: [2, 3, 3], 24: [2, 4, 6]}
"""By head_dim; the released models have 2 : 3 : 3."""

TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"norm": VisionNorm.rmsnorm, "mlp": VisionMLP.swiglu},
    "windowed": {
        "norm": VisionNorm.rmsnorm,
        "mlp": VisionMLP.swiglu,
        "window_size": 56,
        "full_attention_layers": [1],
    },
}
"""Name of a kind of ViT -> what its description says besides sizes."""


def small_model(
    *,
    heads: int,
    kv_heads: int,
    tied: bool,
    head_dim: int = 16,
    vision_heads: int = 4,
    vision_head_dim: int = 16,
    num_layers: int = 4,
    vocab_size: int = 64,
    tower: str = "plain",
) -> ModelConfig:
    """A model of a few hundred thousand parameters, with uneven mrope sections.

    Its rotary base of 1000 turns its few pairs by angles that differ within a short sequence, as
    1e6 does over 64 pairs and thousands of positions.
    """
    width = vision_heads * vision_head_dim
    return ModelConfig(
        name="small",
        vision=VisionConfig(
            depth=2, hidden_size=width, num_heads=vision_heads, intermediate_size=2 * width,
            **TOWERS[tower],
        ),
        language=LanguageConfig(
            hidden_size=heads * head_dim, num_layers=num_layers, num_heads=heads,
            num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=96, vocab_size=vocab_size,
            tie_word_embeddings=tied, rope_theta=1000.0, mrope_section=MROPE_SECTIONS[head_dim],
            max_position_embeddings=512,
        ),
        tokens=TOKENS,
    )  # fmt: skip


@dataclass
class Conversation:
    """One sample: ids with placeholders repeated, targets, and the images' patches."""

    input_ids: np.ndarray
    targets: np.ndarray
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros((0, PATCH_DIM), np.uint8))


def conversation(
    rng: np.random.Generator, images: Sequence[tuple[int, int]], vocab: int = 64
) -> Conversation:
    """Random text around images of the given grids (h, w in patches).

    About half of the text tokens are targets.
    """
    ids: list[int] = []
    targets: list[int] = []

    def text() -> None:
        count = int(rng.integers(3, 9))
        ids.extend(int(t) for t in rng.integers(FIRST_TEXT_TOKEN, vocab, count))
        targets.extend(int(t) for t in rng.integers(0, 2, count))

    text()
    for h, w in images:
        ids.extend([TOKENS.vision_start, *[TOKENS.image_pad] * (h * w // 4), TOKENS.vision_end])
        targets.extend([0] * (h * w // 4 + 2))
        text()
    ids.append(TOKENS.im_end)
    targets.append(1)
    num_patches = sum(h * w for h, w in images)
    return Conversation(
        np.array(ids, np.int32),
        np.array(targets, np.uint8),
        [(1, h, w) for h, w in images],
        rng.integers(0, 256, (num_patches, PATCH_DIM), dtype=np.uint8),
    )


def conversations(seed: int) -> list[Conversation]:
    """Odd aspect ratios, several images, text only."""
    rng = np.random.default_rng(seed)
    grids = [[(2, 8)], [], [(6, 4), (2, 2), (4, 10)], [(12, 2)], [], [(4, 4)]]
    return [conversation(rng, images) for images in grids]


def random_conversations(seed: int) -> list[Conversation]:
    """Six samples in random order: two of text only, the others with one to three images of random
    shape, up to 13 : 1 in either direction.
    """
    rng = np.random.default_rng(seed)
    sides = rng.choice([2, 2, 4, 6, 10, 26], (4, 3, 2))
    images = [[(int(h), int(w)) for h, w in sample[: rng.integers(1, 4)]] for sample in sides]
    samples = [conversation(rng, grids) for grids in [*images, [], []]]
    return [samples[i] for i in rng.permutation(len(samples))]


def transformers_model(model: ModelConfig, seed: int) -> nn.Module:
    """A ``Qwen2VLForConditionalGeneration`` of this size with perturbed random weights, fp32."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration  # late: it takes 4 s

    config = Qwen2VLConfig(**hf_config(model))
    config._attn_implementation = "sdpa"
    reference = Qwen2VLForConditionalGeneration(config).float()
    perturb(reference, seed)
    return reference.eval()


def perturb(module: nn.Module, seed: int) -> None:
    """Matrices at 1/sqrt(fan_in), norm weights around 1, biases around 0 with deviation 0.2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(1.0 + 0.2 * noise)


@dataclass
class Outcome:
    """What is compared: logits of each sample, mean loss, gradients by Hugging Face name."""

    logits: list[Tensor]
    loss: float
    grads: dict[str, Tensor]


@dataclass(frozen=True)
class Distance:
    """How far one outcome is from another: the worst of each kind, or a bar for it."""

    logits: float
    """Largest difference / largest logit, of any sample."""
    loss: float
    """Relative."""
    grads: float
    """Largest difference / largest element, of any tensor."""
    worst_grad: str = ""

    def times(self, bar: "Distance") -> "Distance":
        """Each kind as a multiple of its bar."""
        return Distance(
            self.logits / bar.logits, self.loss / bar.loss, self.grads / bar.grads, self.worst_grad
        )

    @property
    def largest(self) -> float:
        """Of the three kinds."""
        return max(self.logits, self.loss, self.grads)

    def __str__(self) -> str:
        return f"{self.logits:9.1e} {self.loss:9.1e} {self.grads:9.1e}  {self.worst_grad}"


BAR = Distance(logits=2e-5, loss=2e-6, grads=3e-5)
"""How far fp32 may be from transformers; measured: a third of it at most (docs/parity.md)."""


def distance(got: Outcome, want: Outcome) -> Distance:
    """Compare in fp64; a gradient that is zero in theory counts against 1e-7 of the largest one."""
    assert got.grads.keys() == want.grads.keys()
    assert [x.shape for x in got.logits] == [x.shape for x in want.logits]
    floor = 1e-7 * max(float(grad.abs().max()) for grad in want.grads.values())
    grads = {name: _relative(got.grads[name], want.grads[name], floor) for name in want.grads}
    worst = max(grads, key=lambda name: grads[name])
    logits = [_relative(g, w) for g, w in zip(got.logits, want.logits, strict=True)]
    return Distance(max(logits), abs(got.loss - want.loss) / want.loss, grads[worst], worst)


def _relative(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    want = want.double()
    return float((got.double() - want).abs().max()) / max(float(want.abs().max()), floor)


def run_reference(reference: nn.Module, samples: Sequence[Conversation]) -> Outcome:
    """Loss summed over the targets of all samples, divided by their number.

    One sample at a time.
    """
    dtype = next(reference.parameters()).dtype
    reference.zero_grad()
    count = num_targets(samples)
    logits, total = [], 0.0
    for sample in samples:
        ids = torch.tensor(sample.input_ids[None].astype(np.int64))
        extra = {}
        if sample.grids:  # a sample has images or videos
            pixels, grids = "pixel_values", "image_grid_thw"
            if TOKENS.video_pad in sample.input_ids:
                pixels, grids = "pixel_values_videos", "video_grid_thw"
            extra = {
                pixels: normalized(sample.pixels).to(dtype),
                grids: torch.tensor(sample.grids),
            }
        out = reference(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=((ids == TOKENS.image_pad) + 2 * (ids == TOKENS.video_pad)).int(),
            **extra,
        ).logits[0]
        logits.append(out.detach())
        losses = nn.functional.cross_entropy(out[:-1], ids[0, 1:], reduction="none")
        loss = losses[torch.tensor(sample.targets[1:], dtype=torch.bool)].double().sum()
        (loss / count).backward()
        total += loss.item()
    grads = {
        hub_name(name): parameter.grad.detach().clone()
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None
    }
    return Outcome(logits, total / count, grads)


def num_targets(samples: Sequence[Conversation]) -> int:
    """Tokens that count: no sample can predict its first."""
    return sum(int(sample.targets[1:].sum()) for sample in samples)


def normalized(pixels: np.ndarray) -> Tensor:
    """Rescaled and normalised in fp64, independently of our code: (P, 1176)."""
    mean, std = (np.repeat(np.array(x), PATCH_DIM // 3) for x in (CLIP_MEAN, CLIP_STD))
    return torch.tensor((pixels / 255.0 - mean) / std)


@contextmanager
def fp64_throughout() -> Iterator[None]:
    """Let ``reference.double()`` compute in fp64 where transformers itself goes through fp32.

    That is the RMSNorms and the ViT's rotation. Rotary angles stay fp32, as they are on both sides.
    """
    from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

    def norm(self: nn.Module, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        normed: Tensor = self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))
        return normed

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (x.unsqueeze(-2).double() for x in (cos, sin))
        q, k = (x * cos + theirs.rotate_half(x) * sin for x in (q, k))
        return q, k

    with (
        mock.patch.object(theirs.Qwen2VLRMSNorm, "forward", norm),
        mock.patch.object(theirs, "apply_rotary_pos_emb_vision", rotate),
    ):
        yield


def save_reference(reference: nn.Module, folder: Path) -> Path:
    """As a Hugging Face folder."""
    reference.save_pretrained(folder)
    return folder

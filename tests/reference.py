"""transformers' Qwen2-VL as the reference: small random models, one sample at a time, no packing,
no parallelism.

Weights are drawn at 1/sqrt(fan_in); biases and norm weights are perturbed, so that nothing is zero
or symmetric and a swapped axis or a dropped bias shows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from triptych.configs.schema import LanguageConfig, ModelConfig, TokensConfig, VisionConfig
from triptych.data.image import CLIP_MEAN, CLIP_STD, PATCH_DIM

TOKENS = TokensConfig(
    endoftext=0, im_start=1, im_end=2, vision_start=9, vision_end=10, image_pad=12, video_pad=13
)


def small_model(
    *, heads: int, kv_heads: int, tied: bool, head_dim: int = 16, vision_heads: int = 4
) -> ModelConfig:
    """A model of a few hundred thousand parameters, with uneven mrope sections."""
    sections = {16: [2, 3, 3], 8: [2, 1, 1], 24: [2, 4, 6]}[head_dim]
    return ModelConfig(
        name="small",
        vision=VisionConfig(
            depth=2, hidden_size=16 * vision_heads, num_heads=vision_heads,
            intermediate_size=32 * vision_heads,
        ),
        language=LanguageConfig(
            hidden_size=heads * head_dim, num_layers=4, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=head_dim, intermediate_size=96, vocab_size=64, tie_word_embeddings=tied,
            mrope_section=sections, max_position_embeddings=512,
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


def conversation(rng: np.random.Generator, images: list[tuple[int, int]], vocab: int = 64):
    """Random text around images of the given grids (h, w in patches).

    About half of the text tokens are targets.
    """
    ids: list[int] = []
    targets: list[int] = []

    def text() -> None:
        count = int(rng.integers(3, 9))
        ids.extend(int(t) for t in rng.integers(14, vocab, count))
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


def transformers_model(model: ModelConfig, seed: int) -> nn.Module:
    """A ``Qwen2VLForConditionalGeneration`` of this size with perturbed random weights, fp32."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from triptych.checkpoints.hf_config import hf_config

    config = Qwen2VLConfig(**hf_config(model))
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
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


def run_reference(reference: nn.Module, samples: list[Conversation]) -> Outcome:
    """Loss summed over the targets of all samples, divided by their number.

    One sample at a time.
    """
    from triptych.checkpoints.names import hub_name

    dtype = next(reference.parameters()).dtype
    reference.zero_grad()
    count = sum(int(sample.targets[1:].sum()) for sample in samples)
    logits, total = [], 0.0
    for sample in samples:
        ids = torch.tensor(sample.input_ids[None].astype(np.int64))
        extra = {}
        if sample.grids:
            extra = {
                "pixel_values": normalized(sample.pixels).to(dtype),
                "image_grid_thw": torch.tensor(sample.grids),
            }
        out = reference(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == TOKENS.image_pad).int(),
            **extra,
        ).logits[0]
        logits.append(out.detach())
        losses = nn.functional.cross_entropy(out[:-1], ids[0, 1:], reduction="none")
        loss = losses[torch.tensor(sample.targets[1:], dtype=torch.bool)].sum()
        (loss / count).backward()
        total += loss.detach().double().item()
    grads = {
        hub_name(name): parameter.grad.detach().clone()
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None
    }
    return Outcome(logits, total / count, grads)


def normalized(pixels: np.ndarray) -> Tensor:
    """Rescaled and normalised in fp64, independently of our code: (P, 1176)."""
    mean, std = (np.repeat(np.array(x), PATCH_DIM // 3) for x in (CLIP_MEAN, CLIP_STD))
    return torch.tensor((pixels / 255.0 - mean) / std)


def save_reference(reference: nn.Module, folder: Path) -> Path:
    """As a Hugging Face folder."""
    reference.save_pretrained(folder)
    return folder

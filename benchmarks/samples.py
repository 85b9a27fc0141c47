"""Samples of mixed resolution, drawn; and packs of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triptych.configs.model_schema import ModelConfig
from triptych.data.loading.collate import Segment
from triptych.data.types import SampleId


@dataclass(frozen=True, slots=True)
class Mix:
    """Pairs and interleaved articles: up to two images each, every text token a target."""

    num_samples: int
    sides: tuple[int, int]
    """Patches along each side of an image, least and most; small ones are as likely as large."""
    text: tuple[int, int]
    """Text tokens: median, most."""


def draw_samples(mix: Mix, model: ModelConfig, seed: int = 0) -> list[Segment]:
    """Samples in the numbers of the mix; the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [_draw(rng, SampleId(0, index), mix, model) for index in range(mix.num_samples)]


def _draw(rng: np.random.Generator, sample_id: SampleId, mix: Mix, model: ModelConfig) -> Segment:
    num_images = int(rng.choice([0, 1, 2], p=[0.1, 0.7, 0.2]))
    least, most = np.log(np.array(mix.sides) / 2)
    sides = 2 * np.rint(np.exp(rng.uniform(least, most, (num_images, 2)))).astype(int)
    median, longest = mix.text
    length = int(np.clip(rng.lognormal(np.log(median), 0.8), 8, longest))
    tokens, patch_dim = model.tokens, model.vision.patch_dim
    blocks = [
        [tokens.vision_start, *[tokens.image_pad] * (int(h * w) // 4), tokens.vision_end]
        for h, w in sides
    ]
    text = rng.integers(7, min(model.language.vocab_size, 10_000), length)
    ids = np.concatenate([*blocks, text])
    return Segment(
        sample_id,
        ids.astype(np.int32),
        np.concatenate([np.zeros(len(ids) - length), np.ones(length)]).astype(np.uint8),
        np.array([(1, h, w) for h, w in sides], np.int64).reshape(-1, 3),
        (rng.integers(0, 256, (int(sides.prod(axis=1).sum()), patch_dim), dtype=np.uint8),),
    )


def first_fit(samples: Sequence[Segment], pack_tokens: int) -> list[list[Segment]]:
    """Packs of at most ``pack_tokens`` tokens."""
    packs: list[list[Segment]] = []
    for sample in sorted(samples, key=num_tokens, reverse=True):
        room = pack_tokens - num_tokens(sample)
        fitting = (pack for pack in packs if sum(map(num_tokens, pack)) <= room)
        pack = next(fitting, None)
        if pack is None:
            packs.append(pack := [])
        pack.append(sample)
    return packs


def num_tokens(sample: Segment) -> int:
    """Tokens of a sample, text and vision."""
    return len(sample.input_ids)

"""The mixture that planning is measured on: five sources, drawn from a fixed seed.

Captions, OCR, interleaved articles, VQA and text: image sides log-uniform, text lengths log-normal.
63 % of the tokens are vision, 2.52 patches to a token of any kind.
"""

import numpy as np
from numpy.typing import NDArray

from triptych.configs.schema import Oversize
from triptych.data.dataset.sizes import sizes_of
from triptych.data.plan.order import Plan
from triptych.data.plan.plan_sources import PlanSource

NUM_SAMPLES = 200_000
SEQ_LEN, WINDOW = 8192, 4096
MAX_PATCHES = 21504
"""4 % more than the mixture needs on average: both budgets bind."""
VISION_SHARE = 0.63
MIXTURE = {
    # source: (weight, images per sample, shortest and longest side, median and spread of the text)
    "captions": (0.50, 1, 112, 1344, 40, 0.6),
    "ocr": (0.15, 1, 448, 2000, 300, 0.9),
    "interleaved": (0.15, 4, 224, 896, 600, 0.8),
    "vqa": (0.10, 1, 224, 1120, 120, 0.7),
    "text": (0.10, 0, 28, 28, 700, 1.0),
}


def make_plan(max_patches: int = MAX_PATCHES) -> Plan:
    """The mixture under a bound of patches per pack."""
    rng = np.random.default_rng(0)
    return Plan(
        [_draw_source(name, rng) for name in MIXTURE],
        seed=0,
        seq_len=SEQ_LEN,
        max_patches=max_patches,
        window=WINDOW,
        oversize=Oversize.skip,
    )


def _draw_source(name: str, rng: np.random.Generator) -> PlanSource:
    """Token and patch counts of one source."""
    weight, num_images, low, high, median, spread = MIXTURE[name]
    sides = np.exp(rng.uniform(np.log(low), np.log(high), (2, NUM_SAMPLES, num_images)))
    patches = (4 * np.maximum(1, np.rint(sides / 28)).prod(axis=0)).astype(np.int64)
    text = np.clip(rng.lognormal(np.log(median), spread, NUM_SAMPLES), 8, 6000).astype(np.int64)
    tokens: NDArray[np.int64] = patches.sum(axis=1) // 4 + 2 * num_images + text
    sizes = sizes_of(tokens, patches.sum(axis=1), (patches**2).sum(axis=1))
    return PlanSource(name, weight, sizes)

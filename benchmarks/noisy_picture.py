"""Pictures about as hard to decode as photographs; imports little, as processes of a pool do."""

import numpy as np
from PIL import Image


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coarse shapes of 32 pixels, and noise."""
    coarse = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

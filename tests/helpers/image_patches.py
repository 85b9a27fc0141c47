"""An image's patches the way of the loader, in one call."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.configs.model_schema import VisionConfig
from triptych.data.media.image import cut_patches, image_frames, image_grid
from triptych.data.media.kinds import Grid
from triptych.data.types import PixelLimits


def image_patches(
    image: Image.Image, limits: PixelLimits, vision: VisionConfig
) -> tuple[NDArray[np.uint8], Grid]:
    """The patches of an 8-bit RGB image, (h*w, patch_dim) uint8, and its grid (1, h, w)."""
    grid = image_grid(image.height, image.width, limits, vision)
    size = (grid[1] * vision.patch_size, grid[2] * vision.patch_size)
    return cut_patches(image_frames(image, size), vision), grid

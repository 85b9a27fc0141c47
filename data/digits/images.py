"""Pictures of one or two handwritten digits, composed from the scans that scikit-learn bundles.

The 1,797 scans (8x8 pixels, 16 grey levels) are split once: no scan of a held-out picture is ever
in a training picture. Sizes are split too: pictures whose tokens form one of ``UNSEEN_GRIDS`` are
for evaluation only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NUM_TRAIN_SCANS = 1400
MIN_SIDE, MAX_SIDE = 28, 168
"""Pixels: of 1 to 6 tokens along each side."""
CLOSE_UP_SIDE = 64
"""Pixels: the largest side of a close-up, which one digit fills."""
MIN_DIGIT, MAX_DIGIT = 20, 72
"""Pixels along the sides of a digit's 8x8 scan."""
MAX_TILT, MAX_SLANT = 6.0, 0.1
"""Degrees, and pixels per row, that training bends scans by: 1,400 are soon known by heart."""
BLENDED = 0.5
"""Share of training's digits that lie between two scans of the same digit."""
UNSEEN_GRIDS = ((2, 4), (4, 2), (3, 5), (5, 3))
"""(rows, columns) of 28 pixels, after rounding."""


@dataclass(frozen=True, slots=True)
class Scans:
    """Part of the scans."""

    images: NDArray[np.uint8]
    """(num_scans, 8, 8), 0 to 255."""
    digits: NDArray[np.int64]
    """(num_scans,) 0 to 9."""


@dataclass(frozen=True, slots=True)
class DigitImage:
    """A composed picture and what it reads from left to right."""

    image: Image.Image
    """8-bit grey."""
    answer: str
    size_is_unseen: bool


@cache
def load_scans() -> tuple[Scans, Scans]:
    """The scans for training and those held out; the split never changes."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(digits))
    train, heldout = order[:NUM_TRAIN_SCANS], order[NUM_TRAIN_SCANS:]
    return Scans(pixels[train], digits[train]), Scans(pixels[heldout], digits[heldout])


def compose(
    rng: np.random.Generator,
    scans: Scans,
    num_digits: int,
    *,
    unseen_size: bool,
    max_side: int = MAX_SIDE,
    vary: bool = False,
) -> DigitImage:
    """Draws a picture: size, background, and digits at random scale, shape and place.

    Digits stand in disjoint columns, so their order from left to right is never in doubt. With
    ``vary`` scans are also blended and bent.
    """
    height, width = _draw_size(rng, num_digits, max_side, unseen_size=unseen_size)
    grey, noise = rng.integers(0, 60), rng.integers(1, 12)
    canvas = (grey + rng.integers(0, noise, (height, width))).astype(np.uint8)
    chosen = rng.integers(0, len(scans.digits), num_digits)
    widths, heights = _draw_boxes(rng, num_digits, height, width)
    gaps = np.sort(rng.integers(0, width - widths.sum() + 1, num_digits))
    for i, scan in enumerate(chosen):
        left = int(gaps[i] + widths[:i].sum())
        top = int(rng.integers(0, height - heights[i] + 1))
        box = canvas[top : top + heights[i], left : left + widths[i]]
        pixels = _blend(scans, scan, rng) if vary else scans.images[scan]
        glyph = _scale(pixels, heights[i], widths[i], rng)
        np.maximum(box, _bend(glyph, rng) if vary else glyph, out=box)
    answer = "".join(str(digit) for digit in scans.digits[chosen])
    return DigitImage(Image.fromarray(canvas), answer, unseen_size)


def heldout_images(num_images: int, seed: int) -> Iterator[DigitImage]:
    """Pictures for evaluation: half have two digits, a quarter a size that training never shows."""
    rng = np.random.default_rng([seed, 1])
    _, scans = load_scans()
    for i in range(num_images):
        yield compose(rng, scans, 1 + i % 2, unseen_size=i % 8 >= 6)


def training_images(num_images: int, seed: int) -> Iterator[DigitImage]:
    """Pictures for training: half have two digits, none an unseen size."""
    rng = np.random.default_rng([seed, 0])
    scans, _ = load_scans()
    for i in range(num_images):
        yield compose(rng, scans, 1 + i % 2, unseen_size=False, vary=True)


def close_up_images(num_images: int, seed: int) -> Iterator[DigitImage]:
    """Small pictures for training that one digit fills: what a ViT learns soonest."""
    rng = np.random.default_rng([seed, 2])
    scans, _ = load_scans()
    for _ in range(num_images):
        yield compose(rng, scans, 1, unseen_size=False, max_side=CLOSE_UP_SIDE, vary=True)


def _draw_size(
    rng: np.random.Generator, num_digits: int, max_side: int, *, unseen_size: bool
) -> tuple[int, int]:
    """Height and width in pixels; small ones are as likely as large ones (log-uniform)."""
    smallest = np.log([MIN_SIDE, MIN_SIDE if num_digits == 1 else num_digits * MIN_DIGIT + 2])
    while True:
        height, width = np.exp(rng.uniform(smallest, np.log(max_side + 1))).astype(int).tolist()
        grid = (round(height / 28), round(width / 28))
        if (grid in UNSEEN_GRIDS) == unseen_size:
            return height, width


def _draw_boxes(
    rng: np.random.Generator, num_digits: int, height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Widths and heights of the digits, in pixels; together they are no wider than the picture."""
    largest = min(width // num_digits, height, MAX_DIGIT)
    smallest = max(MIN_DIGIT, 3 * largest // 4)
    scale = rng.integers(smallest, largest + 1)
    sides = np.maximum(MIN_DIGIT, (scale * rng.uniform(0.8, 1, (2, num_digits))).astype(int))
    return sides[0], sides[1]


def _scale(
    scan: NDArray[np.uint8], height: int, width: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    glyph = Image.fromarray(scan).resize((int(width), int(height)), Image.Resampling.BICUBIC)
    brightness = rng.uniform(0.75, 1)
    return (np.asarray(glyph) * brightness).astype(np.uint8)


def _blend(scans: Scans, scan: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The scan, or as often a mean of it and another of the same digit, mostly of itself."""
    image: NDArray[np.uint8] = scans.images[scan]
    if rng.random() >= BLENDED:
        return image
    other = rng.choice(np.flatnonzero(scans.digits == scans.digits[scan]))
    share = rng.uniform(0.5, 1)
    blended: NDArray[np.uint8] = (share * image + (1 - share) * scans.images[other]).astype(
        np.uint8
    )
    return blended


def _bend(glyph: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turns and slants a digit a little, about its middle."""
    tilt = np.radians(rng.uniform(-MAX_TILT, MAX_TILT))
    slant = rng.uniform(-MAX_SLANT, MAX_SLANT)
    turn = np.array([[np.cos(tilt), slant - np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    middle = np.array(glyph.shape[::-1]) / 2
    shift = middle - turn @ middle
    map_back = (*turn[0], shift[0], *turn[1], shift[1])
    size = (glyph.shape[1], glyph.shape[0])
    bent = Image.fromarray(glyph).transform(
        size, Image.Transform.AFFINE, map_back, Image.Resampling.BICUBIC
    )
    return np.asarray(bent)

"""From the bytes of an image file to ViT patches, exactly as Qwen2-VL does it.

How large a patch is, and how many become a token, the model says (``VisionConfig``).

    bytes --decode_image--> upright RGB or grey --image_frames--> resized    in the loader
    resized --cut_patches--> uint8 patches                                   in the loader
    uint8 patches --normalize_patches--> float32                             on the device

What becomes of an unusual file: every image ends up as 8-bit RGB, or is refused.

    8-bit grey               resized once, not once for each colour
    1-bit, palette           converted
    transparency of any kind composited on white
    CMYK, YCbCr, HSV         converted by Pillow, colour profiles ignored
    16 bits per channel      the high byte is kept
    32-bit, float, LAB       refused: the range of values is unknown
    EXIF orientation         applied; width and height are those of the upright image
    animation                first frame
    kinds not in FORMATS     refused: Pillow hands PostScript to a program that runs it
    empty, cut or no image; ratio of sides above 200; more than MAX_DECODED_PIXELS    refused
"""

import io
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

from triptych.configs.model_schema import VisionConfig
from triptych.data.types import PixelLimits
from triptych.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of the kinds of files that are read."""
MAX_ASPECT_RATIO = 200
MAX_DECODED_PIXELS = 89_478_485
"""256 MiB of RGB, seven times the largest ``max_pixels``; Pillow warns of a bomb beyond it."""


def smart_resize(
    height: ArrayLike,
    width: ArrayLike,
    *,
    factor: int,
    min_pixels: int | NDArray[np.int64],
    max_pixels: int | NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes of nearly the same shape, with sides that are multiples of ``factor``.

    Sides are rounded half to even, as Python's ``round`` does. The area ends up within the bounds,
    except where a side cannot shrink below ``factor``.

    Args:
        height: (num_images,) pixels.
        width: (num_images,) pixels.
        factor: pixels.
        min_pixels: of all or each; smaller images are enlarged.
        max_pixels: of all or each; larger images are reduced.
    Returns:
        Heights and widths, (num_images,) int64 each.
    Raises:
        DataError: one side is 0, or more than 200 times the other.
    Source: arXiv 2409.12191 §2.1; equals transformers 5.23 ``smart_resize``.
    """
    h, w = np.asarray(height, dtype=np.int64), np.asarray(width, dtype=np.int64)
    elongated = np.maximum(h, w) > MAX_ASPECT_RATIO * np.minimum(h, w)
    if elongated.any():
        at = int(np.flatnonzero(elongated)[0])
        raise DataError(
            f"an image of {w[at]}x{h[at]} pixels: one side may be at most {MAX_ASPECT_RATIO} times "
            "the other  -> crop or leave out such images"
        )
    new_h, new_w = np.rint(h / factor) * factor, np.rint(w / factor) * factor
    area = new_h * new_w
    shrink = np.sqrt((h * w) / max_pixels)
    grow = np.sqrt(min_pixels / np.maximum(h * w, 1))
    too_large, too_small = area > max_pixels, area < min_pixels
    for side, new_side in ((h, new_h), (w, new_w)):
        reduced = np.maximum(factor, np.floor(side / shrink / factor) * factor)
        enlarged = np.ceil(side * grow / factor) * factor
        new_side[too_small] = enlarged[too_small]
        new_side[too_large] = reduced[too_large]
    return new_h.astype(np.int64), new_w.astype(np.int64)


def image_grids(
    height: ArrayLike, width: ArrayLike, limits: PixelLimits, vision: VisionConfig
) -> NDArray[np.int64]:
    """Grids of many images, (num_images, 3) int64: frames, rows and columns of unmerged patches."""
    h, w = smart_resize(
        height,
        width,
        factor=vision.resize_factor,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
    )
    return np.stack([np.ones_like(h), h // vision.patch_size, w // vision.patch_size], axis=-1)


def image_grid(
    height: int, width: int, limits: PixelLimits, vision: VisionConfig
) -> tuple[int, int, int]:
    """The grid of one image; remembered, for sizes recur and arrays of one element cost most."""
    return _grid(height, width, limits, vision.resize_factor, vision.patch_size)


@lru_cache(maxsize=2**14)
def _grid(
    height: int, width: int, limits: PixelLimits, factor: int, patch_size: int
) -> tuple[int, int, int]:
    bounds = {"min_pixels": limits.min_pixels, "max_pixels": limits.max_pixels}
    [h], [w] = smart_resize([height], [width], factor=factor, **bounds)
    return 1, int(h) // patch_size, int(w) // patch_size


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decodes a file by the rules at the top of this file.

    Args:
        data: the whole file.
        where: names the file or sample in errors.
    Returns:
        Upright, 8 bits per channel: Pillow's mode ``RGB``, or ``L`` where it is grey.
    Raises:
        DataError: the file is empty, damaged, of an unsupported kind, too large, or too elongated.
    """
    if not data:
        raise DataError(f"{where}: the file is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.size, where)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_8_bits(image, where)
    except DataError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise all kinds of exceptions
        raise DataError(f"{where}: cannot be decoded as an image: {error}") from error


def _check_size(size: tuple[int, int], where: str) -> None:
    """Refuses from the header alone what would exhaust memory or has no grid of patches."""
    width, height = size
    if width * height > MAX_DECODED_PIXELS:
        raise DataError(
            f"{where}: {width}x{height} = {width * height} pixels, above the bound of "
            f"{MAX_DECODED_PIXELS}  -> reduce the image first"
        )
    check_shape(size, where)


def check_shape(size: tuple[int, int], where: str) -> None:
    """Refuses a width and height that have no grid of patches.

    Raises:
        DataError: one is more than 200 times the other.
    """
    width, height = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise DataError(
            f"{where}: {width}x{height} pixels; one side may be at most {MAX_ASPECT_RATIO} times "
            "the other  -> crop it, or leave it out"
        )


def _to_8_bits(image: Image.Image, where: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        high_byte = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(high_byte)
    if image.mode in {"I", "F", "LAB"}:
        raise DataError(
            f"{where}: pixels of kind {image.mode!r} have no defined range"
            "  -> convert the image to 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode in {"RGB", "L"} else image.convert("RGB")


def image_frames(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The one frame of an ``RGB`` or ``L`` image, resized to height and width.

    Returns:
        (1, 3, height, width); of a grey image its three planes are equal.
    """
    if (image.height, image.width) != size:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    colours = "RGB" if image.mode == "RGB" else "L"
    planes = np.empty((3, size[0] * size[1]), dtype=np.uint8)
    for number, colour in enumerate(colours):  # each reuses the memory of the last
        planes[number:] = np.frombuffer(image.tobytes("raw", colour), dtype=np.uint8)
    return planes.reshape(1, 3, *size)


def cut_patches(frames: NDArray[np.uint8], vision: VisionConfig) -> NDArray[np.uint8]:
    """Cuts frames into patches; the patches of one LLM token are neighbours.

    Args:
        frames: (num_frames, 3, height, width) of a size that is a whole grid. The last is repeated
            to fill a patch.
        vision: size of a patch, and how many are a token.
    Returns:
        (t*h*w, patch_dim), each flattened from (channels, frames, rows, columns) of its pixels.
    Source: arXiv 2409.12191 §2.1; equals transformers' ``Qwen2VLImageProcessorPil``.
    """
    depth, merge, side = vision.temporal_patch_size, vision.spatial_merge_size, vision.patch_size
    if len(frames) > 1 and (missing := -len(frames) % depth):
        frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
    num_frames, colours, height, width = frames.shape
    together = min(num_frames, depth)
    t, rows, columns = num_frames // together, height // side // merge, width // side // merge
    # Copied by the row of a patch: numpy takes as long for an item of 14 bytes as for one of 1.
    lines = np.ascontiguousarray(frames).view(f"V{side}")
    cut = lines.reshape(t, together, colours, rows, merge, side, columns, merge)
    cut = np.ascontiguousarray(cut.transpose(0, 3, 6, 4, 7, 2, 1, 5)).view(np.uint8)
    pixels = cut.reshape(-1, colours, together, side * side)
    if together < depth:  # not by repeat, which keeps the interpreter's lock
        pixels = np.broadcast_to(pixels, (len(pixels), colours, depth, side * side))
    return pixels.reshape(-1, vision.patch_dim)

"""Preprocessing against transformers, and the rule for every kind of unusual file."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as oracle_smart_resize,
)

from triptych.configs.model_schema import VisionConfig
from triptych.data.media.image import (
    FORMATS,
    cut_patches,
    decode_image,
    image_frames,
    image_grids,
    smart_resize,
)
from triptych.data.media.normalize import normalize_patches
from triptych.data.types import PixelLimits
from triptych.errors import DataError
from triptych.tests.helpers.image_patches import image_patches

VISION = VisionConfig()
LIMITS = PixelLimits(min_pixels=56 * 56, max_pixels=16384 * 28 * 28)
SMALL = PixelLimits(min_pixels=28 * 28, max_pixels=20 * 28 * 28)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("limits", [LIMITS, SMALL], ids=["default", "small"])
def test_a_224_pixel_square_is_256_patches(limits):
    if limits is LIMITS:
        assert image_grids([224], [224], limits, VISION).tolist() == [[1, 16, 16]]
    [[_, rows, columns]] = image_grids([224], [224], limits, VISION)
    assert rows % 2 == columns % 2 == 0
    assert rows * columns * 14 * 14 <= limits.max_pixels


@pytest.mark.parametrize(("side", "expected"), [(42, 56), (70, 56), (98, 112), (126, 112)])
def test_sides_halfway_between_multiples_round_to_even(side, expected):
    assert smart_resize([side], [28], factor=28, min_pixels=1, max_pixels=10**9) == (expected, 28)


sides = st.integers(1, 8000)


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=20),
    min_tokens=st.integers(1, 40),
    extra_tokens=st.integers(0, 16000),
    odd=st.integers(0, 783),
)
def test_smart_resize_equals_transformers(sizes, min_tokens, extra_tokens, odd):
    bounds = {
        "min_pixels": min_tokens * 784 + odd,
        "max_pixels": (min_tokens + extra_tokens) * 784 + odd,
    }
    kept = [(h, w) for h, w in sizes if max(h, w) <= 200 * min(h, w)]
    expected = [oracle_smart_resize(h, w, **bounds) for h, w in kept]
    heights, widths = smart_resize([h for h, _ in kept], [w for _, w in kept], factor=28, **bounds)
    assert list(zip(heights.tolist(), widths.tolist(), strict=True)) == expected


def test_grids_of_an_index_equal_grids_one_by_one():
    rng = np.random.default_rng(0)
    h = rng.integers(40, 4000, 500).astype(np.uint32)
    w = rng.integers(40, 4000, 500).astype(np.uint32)
    grids = image_grids(h, w, LIMITS, VISION)
    assert grids.dtype == np.int64
    assert grids.tolist() == [
        image_grids([int(a)], [int(b)], LIMITS, VISION)[0].tolist()
        for a, b in zip(h, w, strict=True)
    ]


SIZES = [(1, 1), (10, 2000), (28, 28), (28, 168), (56, 57), (100, 333), (224, 224), (225, 97)]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("limits", [LIMITS, SMALL], ids=["default", "small"])
def test_patches_equal_transformers(size, limits):
    image = noise(*size, seed=size[1])
    pixels, grid = image_patches(image, limits, VISION)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    )
    oracle = processor(images=[image], return_tensors="pt")
    assert grid == tuple(oracle["image_grid_thw"][0].tolist())
    assert pixels.dtype == np.uint8
    assert torch.equal(normalize_patches(torch.from_numpy(pixels)), oracle["pixel_values"])


def cut_slowly(image: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Patches of one frame, one number after the other: token by token, patch by patch in each."""
    side, merge = vision.patch_size, vision.spatial_merge_size
    height, width, _ = image.shape
    patches = []
    for top in range(0, height, side * merge):
        for left in range(0, width, side * merge):
            for row in range(top, top + side * merge, side):
                for column in range(left, left + side * merge, side):
                    square = image[row : row + side, column : column + side]
                    patches.append(
                        [
                            square[y, x, channel]
                            for channel in range(3)
                            for _ in range(vision.temporal_patch_size)
                            for y in range(side)
                            for x in range(side)
                        ]
                    )
    return np.array(patches, dtype=np.uint8)


@pytest.mark.parametrize("patch_size", [8, 14, 16])
@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_patches_of_any_geometry_are_those_of_a_slow_cut(patch_size, merge, num_frames):
    """The picture fits a grid already, so only the cut is compared."""
    vision = VisionConfig(
        patch_size=patch_size, spatial_merge_size=merge, temporal_patch_size=num_frames
    )
    image = noise(2 * vision.resize_factor, 3 * vision.resize_factor, seed=merge)
    limits = PixelLimits(min_pixels=1, max_pixels=10**6)
    patches, grid = image_patches(image, limits, vision)
    assert grid == (1, 2 * merge, 3 * merge)
    assert patches.shape == (6 * vision.patches_per_token, vision.patch_dim)
    assert np.array_equal(patches, cut_slowly(np.asarray(image), vision))
    normalised = normalize_patches(torch.from_numpy(patches))
    assert normalised.shape == patches.shape
    assert image_grids([300], [500], limits, vision)[0, 1:].max() % merge == 0


@pytest.mark.parametrize(("there", "depth"), [(2, 3), (3, 2), (5, 2), (4, 4)])
def test_the_last_of_several_frames_fills_the_last_patch(there, depth):
    vision = VisionConfig(temporal_patch_size=depth)
    frames = np.stack([np.asarray(noise(56, 84, seed)).transpose(2, 0, 1) for seed in range(there)])
    filled = np.concatenate([frames, *[frames[-1:]] * (-there % depth)])
    patches = cut_patches(frames, vision)
    assert np.array_equal(patches, cut_patches(filled, vision))
    by_frame = patches.reshape(len(filled) // depth, 24, 3, depth, 196)
    for number, frame in enumerate(filled):
        [alone] = cut_patches(frame[None], vision).reshape(1, 24, 3, depth, 196)
        assert np.array_equal(by_frame[number // depth, :, :, number % depth], alone[:, :, 0])


def test_normalize_patches_leaves_its_argument_alone():
    pixels = torch.full((4, 1176), 255, dtype=torch.uint8)
    assert normalize_patches(pixels).dtype == torch.float32
    assert (pixels == 255).all()
    assert normalize_patches(pixels[:0]).shape == (0, 1176)


def grey_16_bit() -> bytes:
    return encoded(Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16)))


@settings(deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), rows=st.integers(1, 4))
def test_a_grey_image_has_the_pixels_of_the_same_in_rgb(height, width, rows):
    grey = noise(height, width).convert("L")
    assert decode_image(encoded(grey), "x").mode == "L"
    size = (28 * rows, 56)
    frames, expected = (image_frames(image, size) for image in (grey, grey.convert("RGB")))
    assert np.array_equal(frames, expected)
    assert frames.shape == (1, 3, *size)


def test_16_bit_grey_keeps_the_high_byte():
    assert np.asarray(decode_image(grey_16_bit(), "x"))[0].tolist() == [0, 0, 1, 255]


def test_transparency_is_composited_on_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 51))
    pixels = np.asarray(decode_image(encoded(rgba), "x"))[0].tolist()
    assert pixels == [[255] * 3, [10, 20, 30], [204] * 3]


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 90])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=0)
    assert np.asarray(decode_image(data, "x"))[0].tolist() == [[255] * 3, [0, 0, 90]]


def test_exif_orientation_is_applied():
    image = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright = decode_image(encoded(image, exif=exif), "x")
    assert upright.size == (4, 6)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), 3))


@pytest.mark.parametrize(
    "data",
    [
        encoded(noise(8, 9).convert("1")),
        encoded(noise(8, 9).convert("P")),
        encoded(noise(8, 9).convert("LA")),
        encoded(noise(8, 9).convert("CMYK"), "JPEG"),
        encoded(noise(8, 9).convert("YCbCr"), "JPEG"),
        encoded(noise(8, 9), "GIF", save_all=True, append_images=[noise(8, 9, 1)]),
        encoded(noise(8, 9), "MPO"),
        *(encoded(noise(8, 9), kind) for kind in FORMATS),
    ],
    ids=["1", "P", "LA", "CMYK", "YCbCr", "animation", "mpo", *map(str.lower, FORMATS)],
)
def test_unusual_kinds_become_rgb(data):
    image = decode_image(data, "x")
    assert (image.mode, image.size) == ("RGB", (9, 8))


def test_cmyk_white_stays_white():
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert np.asarray(decode_image(encoded(white, "JPEG", quality=95), "x")).min() >= 250


def test_one_pixel_is_enlarged():
    pixels, grid = image_patches(decode_image(encoded(noise(1, 1)), "x"), LIMITS, VISION)
    assert grid == (1, 4, 4)
    assert (pixels == pixels[0, [0, 392, 784]].repeat(392)).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"not an image", "cannot be decoded"),
        (encoded(noise(64, 64))[:2000], "cannot be decoded"),
        (encoded(noise(64, 64), "JPEG")[:1500], "cannot be decoded"),
        (encoded(noise(64, 64))[:30], "cannot be decoded"),
        (encoded(noise(64, 64), "EPS"), "cannot be decoded"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "no defined range"),
        (encoded(Image.new("L", (2001, 10))), "at most 200 times"),
        (encoded(Image.new("1", (12000, 9000))), "above the bound of 89478485"),
        (encoded(Image.new("1", (20000, 20000))), "decompression bomb"),
    ],
    ids=["empty", "text", "cut", "cut-jpeg", "header", "eps", "float", "long", "large", "bomb"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused(data, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_image(data, "images/cat.png")
    assert str(caught.value).startswith("images/cat.png: ")


@settings(deadline=None)
@given(st.data())
def test_damaged_files_decode_or_raise_data_errors(data):
    good = data.draw(
        st.sampled_from([encoded(noise(20, 30)), encoded(noise(20, 30), "JPEG"), grey_16_bit()])
    )
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(damaged), "x").mode in {"RGB", "L"}
    except DataError:
        pass


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (0, 5)])
def test_smart_resize_refuses_elongated_images(size):
    with pytest.raises(DataError, match=f"{size[1]}x{size[0]} pixels"):
        smart_resize([size[0]], [size[1]], factor=28, min_pixels=3136, max_pixels=10**6)

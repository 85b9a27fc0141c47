"""From the bytes of a video file to ViT patches, as Qwen2-VL does it.

How many frames, and how large, follows from what the index knows: width, height, frames and
duration. Which frames, and their pixels, a process of ``data/media/decoder.py`` says.

    frames      limits.fps per second, at least min_frames and at most max_frames, a multiple of
                ``temporal_patch_size``; a video that has fewer repeats its last
    pixels      of a frame: an even share of max_tokens, at most max_pixels and at least min_pixels,
                the share having the last word
    resizing    torch's antialiased bicubic on 8-bit pixels, which is torchvision's, and so what
                transformers and qwen-vl-utils do with videos (with images it is Pillow's)
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triptych.configs.model_schema import VisionConfig
from triptych.data.media.decoder import VideoDecoder, decode
from triptych.data.media.image import smart_resize
from triptych.data.types import Media, VideoLimits
from triptych.errors import DataError


def num_frames(
    frames: ArrayLike, duration_ms: ArrayLike, limits: VideoLimits, factor: int
) -> NDArray[np.int64]:
    """How many frames of each video are looked at, (num_videos,) int64.

    Args:
        frames: (num_videos,) that the videos have.
        duration_ms: (num_videos,) how long they last.
        limits: of the run.
        factor: frames of a patch. Fewer than these are looked at only where there are no more.

    Source: transformers 5.23, ``Qwen2VLVideoProcessor.sample_frames``, which refuses a video of one
        frame.
    """
    there = np.asarray(frames, dtype=np.int64)
    wanted = np.maximum(np.asarray(duration_ms) * limits.fps / 1000, limits.min_frames)
    most = np.minimum(there, limits.max_frames)
    rounded = np.minimum(wanted, most).astype(np.int64) // factor * factor
    return np.maximum(rounded, np.minimum(there, factor))


def video_grids(
    height: ArrayLike,
    width: ArrayLike,
    frames: ArrayLike,
    duration_ms: ArrayLike,
    limits: VideoLimits,
    vision: VisionConfig,
) -> NDArray[np.int64]:
    """Grids of many videos, (num_videos, 3) int64: frames, rows and columns of unmerged patches.

    Source: arXiv 2409.12191 §2.1, which bounds the tokens of a video; qwen-vl-utils for the rest.
    """
    depth, factor = vision.temporal_patch_size, vision.resize_factor
    t = -(-num_frames(frames, duration_ms, limits, depth) // depth)
    most = np.minimum(limits.max_pixels, limits.max_tokens * factor**2 // t)
    least = np.minimum(limits.min_pixels, most)
    h, w = smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
    # Enlarged to `least`, a frame may come out above `most`: then it gets as near from below.
    above = h * w > most
    sides = np.asarray(height, np.int64), np.asarray(width, np.int64)
    scale = np.sqrt(most / (sides[0] * sides[1]))
    for side, new_side in zip(sides, (h, w), strict=True):
        whole = np.floor(side * scale / factor).astype(np.int64) * factor
        new_side[above] = np.maximum(factor, whole)[above]
    return np.stack([t, h // vision.patch_size, w // vision.patch_size], axis=-1)


def video_grid(media: Media, limits: VideoLimits, vision: VisionConfig) -> tuple[int, int, int]:
    """The grid of one video; the same as ``video_grids`` gives."""
    extent = ([media.height], [media.width], [media.frames], [media.duration_ms])
    t, rows, columns = video_grids(*extent, limits, vision)[0].tolist()
    return t, rows, columns


def video_shape(
    media: Media, limits: VideoLimits, vision: VisionConfig
) -> tuple[int, int, int, int]:
    """Of the frames that are looked at: (num_frames, 3, height, width)."""
    factor = vision.temporal_patch_size
    count = int(num_frames(media.frames, media.duration_ms, limits, factor))
    _, rows, columns = video_grid(media, limits, vision)
    return count, 3, rows * vision.patch_size, columns * vision.patch_size


def video_frames(
    data: bytes, media: Media, shape: tuple[int, int, int, int], where: str
) -> NDArray[np.uint8]:
    """The frames that are looked at, resized, of a ``video_shape``, uint8.

    Raises:
        DataError: the file cannot be decoded, or is not what ``media`` says.
    """
    frames = np.empty(shape, dtype=np.uint8)
    wanted = {
        "num_frames": len(frames),
        "frames": media.frames,
        "duration_ms": media.duration_ms,
        "start_ms": media.start_ms,
    }

    def take_frames(decoder: VideoDecoder) -> None:
        for number, frame in enumerate(decoder.frames(data, wanted, where)):
            if frame.shape[:2] != (media.height, media.width):
                raise DataError(
                    f"{where}: {frame.shape[1]}x{frame.shape[0]} pixels, but its dataset says "
                    f"{media.width}x{media.height}  -> prepare the dataset again"
                )
            frames[number] = _resized(frame, shape[2:])

    decode(take_frames)
    return frames


def _resized(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(height, width, 3) to (3, *size)."""
    import torch  # late: preparing measures videos and resizes none
    from torch.nn.functional import interpolate

    if frame.shape[:2] == size:
        return frame.transpose(2, 0, 1)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None]
    [resized] = interpolate(pixels, size=size, mode="bicubic", antialias=True)
    array: NDArray[np.uint8] = resized.numpy()
    return array

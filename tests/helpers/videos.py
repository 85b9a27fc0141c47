"""Video files, made by PyAV where a test needs them, and what transformers makes of one."""

import __future__

import ast
import io
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.video_utils import read_video_pyav

from triptych.configs.model_schema import VisionConfig
from triptych.data.types import VideoLimits


def pictures(num_frames: int, width: int, height: int) -> np.ndarray:
    """Frames that all differ, (num_frames, height, width, 3): shades that move to the right."""
    frame, row, column, colour = np.indices((num_frames, height, width, 3))
    return ((column * 3 + row + 7 * frame + 60 * colour) % 256).astype(np.uint8)


def video(
    num_frames: int = 50,
    *,
    width: int = 64,
    height: int = 48,
    rate: int | Fraction = 25,
    container: str = "mp4",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    times_ms: Sequence[int] = (),
    rotation: int = 0,
    with_audio: bool = False,
) -> bytes:
    """A file. ``times_ms``: when each frame is shown, where that is not at an even rate."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options or {}) as output:
        sound = output.add_stream("aac", rate=48_000) if with_audio else None
        if num_frames or not with_audio:
            stream = output.add_stream(codec, rate=rate)
            stream.width, stream.height = width, height
            stream.codec_context.thread_count = 1
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            if times_ms:
                stream.codec_context.time_base = Fraction(1, 1000)
            if rotation:
                stream.set_display_rotation(rotation)
            for number, picture in enumerate(pictures(num_frames, width, height)):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if times_ms:
                    frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        if sound is not None:
            silence = np.zeros((2, 1024), np.float32)
            for number in range(20):
                heard = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
                heard.sample_rate, heard.pts = 48_000, 1024 * number
                output.mux(sound.encode(heard))
            output.mux(sound.encode())
    return buffer.getvalue()


@cache
def transformers_methods() -> SimpleNamespace:
    """``sample_frames`` and ``patchify`` of transformers' ``Qwen2VLVideoProcessor``, as functions.

    Taken from its source, as the class cannot be imported without torchvision.
    """
    models = Path(transformers.__file__).parent / "models"
    source = (models / "qwen2_vl" / "video_processing_qwen2_vl.py").read_text()
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name in {"sample_frames", "patchify"}
    ]
    names: dict[str, Any] = {"torch": torch, "math": math}
    flags = __future__.annotations.compiler_flag
    exec(compile(ast.Module(functions, []), "qwen2_vl", "exec", flags), names)
    return SimpleNamespace(**names)


def transformers_indices(
    num_frames: int, rate: float, limits: VideoLimits, factor: int = 2
) -> list[int]:
    """The frames that transformers looks at."""
    indices: Tensor = transformers_methods().sample_frames(
        SimpleNamespace(num_frames=None, fps=None),
        SimpleNamespace(total_num_frames=num_frames, fps=rate),
        temporal_patch_size=factor,
        min_frames=limits.min_frames,
        max_frames=limits.max_frames,
        fps=limits.fps,
    )
    return indices.tolist()


def transformers_patches(
    file: Path, limits: VideoLimits, vision: VisionConfig, max_pixels: int
) -> tuple[Tensor, list[int]]:
    """What transformers makes of a file: patches, uint8 as they are before they are normalised, and
    grid. It decodes by PyAV, samples, resizes and cuts; ``max_pixels`` bounds a frame.

    Resizing is torchvision's, which calls torch so.
    """

    def sample(metadata: Any) -> list[int]:
        return transformers_indices(metadata.total_num_frames, metadata.fps, limits)

    frames, _ = read_video_pyav(str(file), sample)
    size = smart_resize(
        *frames.shape[1:3],
        vision.resize_factor,
        min_pixels=limits.min_pixels,
        max_pixels=max_pixels,
    )
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    if pixels.shape[2:] != size:
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    patches, *grid = transformers_methods().patchify(
        None, pixels[None], vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    )
    return patches[0], grid

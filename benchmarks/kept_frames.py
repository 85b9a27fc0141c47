"""Kept frames against decoding them: ``python benchmarks/kept_frames.py --folder FOLDER``.

An image and a video, made here, smooth with some noise, as photographs compress. Prints CPU-seconds
per item: decoded anew each time, processes that decode videos included, and read from a cache in
FOLDER. What the processes spend to read the file itself from its shard is not counted.
"""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import psutil

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.benchmarks.noisy_picture import picture
from triptych.configs.model_schema import VisionConfig
from triptych.configs.schema import DataConfig
from triptych.data.media.cache import FrameCache
from triptych.data.media.kinds import KINDS
from triptych.data.types import Media, MediaKind, PixelLimits

ROUNDS = 3
VISION = VisionConfig()


def jpeg(width: int, height: int) -> bytes:
    """One picture."""
    buffer = io.BytesIO()
    picture(np.random.default_rng(0), width, height).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def film(num_frames: int, width: int, height: int) -> bytes:
    """A picture that moves to the left, at 25 frames per second."""
    wide = np.asarray(picture(np.random.default_rng(0), width + 4 * num_frames + 32, height))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            shown = np.ascontiguousarray(wide[:, 4 * number : 4 * number + width])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def cpu_s(action: Callable[[], object], repeats: int) -> float:
    """Of this process and its children, per call; the least of some rounds."""

    def used() -> float:
        me = psutil.Process()
        times = [process.cpu_times() for process in (me, *me.children())]
        return sum(time.user + time.system for time in times)

    rounds = []
    for _ in range(ROUNDS):
        before = used()
        for _ in range(repeats):
            action()
        rounds.append((used() - before) / repeats)
    return min(rounds)


def measure(what: str, code: MediaKind, data: bytes, repeats: int, folder: Path) -> None:
    """Print one line of an item."""
    kind, limits = KINDS[code], PixelLimits.of(DataConfig())
    media = Media(code, 0, 0, len(data), b"", *kind.measure(data, what))
    shape = kind.shape(media, limits, VISION)
    cache = FrameCache(folder, 10**10)

    def decode() -> np.ndarray:
        return kind.frames(data, media, shape, what)

    def kept() -> np.ndarray:
        return cache.frames(media, shape, decode)

    assert np.array_equal(kept(), decode())
    decoded_s, kept_s = cpu_s(decode, repeats), cpu_s(kept, 20 * repeats)
    print(
        f"{what}, {len(data):,} bytes -> {shape}: decoded {1000 * decoded_s:.1f} CPU-ms, "
        f"kept {1000 * kept_s:.2f} CPU-ms, {decoded_s / kept_s:.1f} times as fast"
    )


def main() -> None:
    """Measure each; the entries are removed."""
    options = parser_with_folder(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        measure("JPEG 448x448", MediaKind.IMAGE, jpeg(448, 448), 300, folder)
        measure("JPEG 1920x1088", MediaKind.IMAGE, jpeg(1920, 1088), 20, folder)
        measure("H.264 640x480, 10 s", MediaKind.VIDEO, film(250, 640, 480), 10, folder)


if __name__ == "__main__":
    main()

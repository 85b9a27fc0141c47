"""Reads video files by PyAV, for another process: see ``data/media/decoder.py``.

    python -m triptych.data.media.video_file < requests > answers

A file may end the process that decodes it, or never let it go on; so this one does nothing else. It
imports neither torch nor, but for what it asks of a file and its frames, the rest of triptych, and
ends itself by a signal when it no longer moves.

    request     a line of JSON, then the file: {"num_bytes", "num_frames", ...}, see ``serve``
    answer      lines of JSON: {"extent"}, or {"frame": [height, width]} and its RGB, ..., {"done"};
                {"error"} where the file is at fault
"""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from triptych.data.media.frame_choice import clip_frames, frame_numbers
from triptych.data.media.mp4_boxes import what_is_cut

FORMATS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif")
"""ffmpeg's names of the kinds of files that are read. Playlists are none of them: they name other
files and hosts, which ffmpeg would open."""
CUT_S = 0.5
"""Seconds that may be missing of what a file says it lasts, besides its last frame."""


class VideoError(Exception):
    """The file is at fault."""


def extent(data: bytes, max_pixels: int, moves: Callable[[], None]) -> dict[str, int]:
    """Decode every frame, and measure what there is.

    Returns:
        Width and height of the upright frame, number of frames, and milliseconds, rounded down.
    """
    if missing := what_is_cut(data):
        raise VideoError(f"it was cut: {missing}")
    count, size, start_s, end_s, last_s = 0, (0, 0), 0.0, 0.0, 0.0
    with opened(data, max_pixels) as (container, stream):
        for packet in container.demux():
            moves()
            if packet.pts is not None:
                ends_at = packet.pts + (packet.duration or 0)
                last_s = max(last_s, float(ends_at * packet.time_base))
            for frame in stream.decode(packet) if packet.stream is stream else ():
                begins_s, lasts_s = _time(frame, count, stream)
                if not count:
                    size, start_s = _upright_size(frame), begins_s
                if _upright_size(frame) != size:
                    raise VideoError(f"frame {count} is of another size than the first, {size}")
                count += 1
                end_s = max(end_s, begins_s + lasts_s)
        stated_s = (container.duration or 0) / av.time_base
        began_s = (container.start_time or 0) / av.time_base
    if not count:
        raise VideoError("it has no frames")
    duration_s = end_s - start_s
    if last_s - began_s < stated_s - CUT_S - duration_s / count:
        raise VideoError(f"it was cut: {last_s - began_s:.2f} of {stated_s:.2f} seconds are there")
    milliseconds = max(1, int(1000 * duration_s + 1e-6))
    return {"width": size[0], "height": size[1], "frames": count, "duration_ms": milliseconds}


def chosen_frames(
    data: bytes, wanted: dict[str, int], max_pixels: int, moves: Callable[[], None]
) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video that are looked at, (height, width, 3) upright RGB, in one pass.

    Args:
        data: the file.
        wanted: ``num_frames`` of the ``frames`` that last ``duration_ms`` from ``start_ms`` on.
        max_pixels: of a frame.
        moves: is called after every packet.
    """
    num_frames, count = wanted["num_frames"], wanted["frames"]
    times_s = _times(data, max_pixels)
    clip = clip_frames(times_s, wanted["start_ms"], wanted["start_ms"] + wanted["duration_ms"])
    if len(clip) != count:
        if wanted["start_ms"]:
            raise VideoError(f"{len(clip)} frames are in the clip, {count} by its dataset")
        clip = range(len(times_s))  # all of it, and frames that do not say when they are shown
    first, times_s = clip.start, times_s[clip.start : clip.stop]
    of_clip = frame_numbers(num_frames, count, times_s, wanted["duration_ms"] / 1000)
    numbers = [first + number for number in of_clip]
    reformatter, taken = VideoReformatter(), 0
    with opened(data, max_pixels) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            moves()
            if numbers[taken] > number:
                continue
            rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            upright: NDArray[np.uint8] = np.ascontiguousarray(
                np.rot90(rgb, _quarter_turns(frame)), dtype=np.uint8
            )
            while taken < num_frames and numbers[taken] == number:
                yield upright
                moves()
                taken += 1
            if taken == num_frames:
                return
    raise VideoError(f"it has fewer frames than the {count} that its dataset says")


def clip_extent(
    data: bytes,
    max_pixels: int,
    moves: Callable[[], None],
    start_ms: int,
    end_ms: int | None,
) -> dict[str, int]:
    """What ``extent`` says, and ``start_ms``, of a part of a video.

    Args:
        data: the file; all of it is decoded.
        max_pixels: of a frame.
        moves: is called after every packet.
        start_ms: of the part, from the first frame.
        end_ms: of the part; None for the end of the video.
    """
    whole = extent(data, max_pixels, moves)
    end_ms = whole["duration_ms"] if end_ms is None else end_ms
    part = f"the clip from {start_ms / 1000:g} to {end_ms / 1000:g} s"
    if not start_ms < end_ms <= whole["duration_ms"] + 1:
        raise VideoError(f"{part} is not within its {whole['duration_ms'] / 1000:g} s")
    times_s = _times(data, max_pixels)
    if len(times_s) != whole["frames"]:
        raise VideoError("it does not say of every frame when it is shown, so it has no clips")
    frames = clip_frames(times_s, start_ms, end_ms)
    if not frames:
        raise VideoError(f"no frame begins in {part}")
    times = {"duration_ms": end_ms - start_ms, "start_ms": start_ms}
    return {**whole, **times, "frames": len(frames)}


@contextmanager
def opened(data: bytes, max_pixels: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its video stream, which decodes in one thread."""
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": ""}
    with av.open(io.BytesIO(data), "r", options=options) as container:
        pictures = Disposition.attached_pic | Disposition.still_image
        streams = [s for s in container.streams.video if not s.disposition & pictures]
        if not streams:
            raise VideoError("it has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError("its codec is not known")
        if stream.width * stream.height > max_pixels:
            raise VideoError(
                f"{stream.width}x{stream.height} = {stream.width * stream.height} pixels, above "
                f"the bound of {max_pixels}"
            )
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def _times(data: bytes, max_pixels: int) -> list[float]:
    """When frames are shown, in order; read from packets alone."""
    with opened(data, max_pixels) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
    return sorted(float(p.pts * p.time_base) for p in packets if p.pts is not None)


def _time(frame: VideoFrame, number: int, stream: VideoStream) -> tuple[float, float]:
    """When a frame is shown, and for how long, in seconds; by the rate where it does not say."""
    lasts = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    if frame.pts is None:
        return number * lasts, lasts
    unit = float(frame.time_base or 0)
    return frame.pts * unit, frame.duration * unit if frame.duration else lasts


def _quarter_turns(frame: VideoFrame) -> int:
    """How often a frame is turned to the left until it is upright, by its display matrix."""
    return round(frame.rotation / 90) % 4


def _upright_size(frame: VideoFrame) -> tuple[int, int]:
    size = (frame.width, frame.height)
    return size[::-1] if _quarter_turns(frame) % 2 else size


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there are no more requests.

    A request with ``num_frames`` 0 asks for the extent, of a ``clip`` or of all. ``cpu_s`` and
    ``wall_s`` are how long no packet may be done with before the process ends itself;
    ``max_pixels`` bounds a frame.
    """

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content).encode() + b"\n")

    while line := requests.readline():
        request = json.loads(line)

        def moves(cpu_s: float = request["cpu_s"], wall_s: float = request["wall_s"]) -> None:
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            signal.setitimer(signal.ITIMER_REAL, wall_s)

        data, max_pixels = requests.read(request["num_bytes"]), request["max_pixels"]
        try:
            moves()
            if request["num_frames"]:
                for frame in chosen_frames(data, request, max_pixels, moves):
                    answer({"frame": frame.shape[:2]})
                    answers.write(frame.data)
                answer({"done": True})
            elif request["clip"]:
                answer({"extent": clip_extent(data, max_pixels, moves, *request["clip"])})
            else:
                answer({"extent": extent(data, max_pixels, moves)})
        except av.error.FFmpegError as error:
            answer({"error": error.strerror})
        except (VideoError, ValueError, MemoryError) as error:
            answer({"error": str(error) or type(error).__name__})
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.flush()


if __name__ == "__main__":
    av.logging.set_level(None)
    with os.fdopen(os.dup(1), "wb") as own_output:
        os.dup2(2, 1)  # what a library prints is no answer
        serve(sys.stdin.buffer, own_output)

"""Which frames of a video are looked at, by the times at which they are shown."""

from collections.abc import Sequence

import numpy as np


def clip_frames(times_s: Sequence[float], start_ms: int, end_ms: int) -> range:
    """The numbers of the frames that begin in a clip; each is in one of clips side by side.

    Args:
        times_s: when frames are shown, in order; clips count from the first.
        start_ms: of the clip.
        end_ms: of the clip.
    """
    times_us = np.rint((np.asarray(times_s) - (times_s[0] if times_s else 0)) * 1e6)
    first, end = np.searchsorted(times_us, [1000 * start_ms, 1000 * end_ms]).tolist()
    return range(first, end)


def frame_numbers(
    num_frames: int, count: int, times_s: Sequence[float], duration_s: float
) -> list[int]:
    """Which frames are looked at: those shown at 0, 1/n, 2/n, ... of the duration.

    Where frames follow each other evenly, that is number i * count // n, as transformers has it.
    Where one of them is off by more than a frame, as in a video of variable rate, their times
    decide.

    Args:
        num_frames: how many.
        count: frames in the video.
        times_s: (count,) seconds at which they are shown, in order; of another length where the
            file does not say it of every frame.
        duration_s: of the whole video or clip.

    Source: transformers 5.23, ``Qwen2VLVideoProcessor.sample_frames``, without its rounding.
    """
    even = [i * count // num_frames for i in range(num_frames)]
    if len(times_s) != count or count < 2:
        return even
    times = np.asarray(times_s) - times_s[0]
    interval = times[-1] / (count - 1)
    if np.abs(times - interval * np.arange(count)).max() <= interval:
        return even
    moments = np.arange(num_frames) * duration_s / num_frames
    shown: list[int] = (np.searchsorted(times, moments, side="right") - 1).tolist()
    return shown

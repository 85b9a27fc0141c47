"""Samples of kinds that the other datasets lack: about a video, a place, and by an agent; articles.

A run on the sample data trains on them in each stage. Their pictures are a board of three by three
cells, each empty or with a digit, so places are known.
"""

import random
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.data.digits.images import load_scans
from triptych.data.digits.texts import Record, text_part, turns

CELL = 28
"""Pixels along the sides of a cell: one token."""
SIDE = 3 * CELL
FPS, SECONDS = 4, 3
"""Of a video, which shows one digit each second."""

Cell = tuple[int, int]
"""Row and column."""


def every_kind(raw: Path, rng: random.Random) -> Iterator[Record]:
    """Records without end, of each kind in turn; pictures and videos are written below ``raw``."""
    for folder in ("images", "videos"):
        (raw / folder).mkdir(exist_ok=True)
    for number in count():
        for make in (_video, _place, _agent, _article):
            yield make(raw, f"every_kind_{number:06d}_{make.__name__[1:]}", rng)


def _video(raw: Path, name: str, rng: random.Random) -> Record:
    """Three digits, one after another, in cells of their own."""
    digits = rng.choices(range(10), k=SECONDS)
    scenes = [_board({cell: digit}, rng) for digit, cell in zip(digits, _cells(rng), strict=False)]
    path = f"videos/{name}.mp4"
    _write_video(raw / path, [scene for scene in scenes for _ in range(FPS)])
    question = [{"type": "video", "video": path}, text_part("Read the digits.")]
    return turns(question, "".join(map(str, digits)))


def _place(raw: Path, name: str, rng: random.Random) -> Record:
    """Where one of two digits is."""
    first, second = rng.sample(range(10), 2)
    (row, column), other, *_ = _cells(rng)
    picture = _save(raw, name, {(row, column): first, other: second}, rng)
    corners = (column * CELL, row * CELL, (column + 1) * CELL - 1, (row + 1) * CELL - 1)
    box = [1000 * pixels // SIDE for pixels in corners]
    digit = {"type": "ref", "text": f"digit {first}"}
    question = [picture, text_part("Where is "), digit, text_part("?")]
    return turns(question, [digit, {"type": "box", "box": box}])


def _agent(raw: Path, name: str, rng: random.Random) -> Record:
    """Touches one of two digits, and reads the board that comes of it."""
    first, second, third = rng.sample(range(10), 3)
    (row, column), other, *_ = _cells(rng)
    before = _save(raw, f"{name}_0", {(row, column): first, other: second}, rng)
    after = _save(raw, f"{name}_1", {other: third}, rng)
    call = {"type": "call", "name": "tap", "arguments": {"cell": 3 * row + column}}
    record = turns([before, text_part(f"Tap {first}.")], [call])
    record["messages"] += [
        {"role": "tool", "content": [after]},
        {"role": "assistant", "content": str(third)},
    ]
    return record


def _article(raw: Path, name: str, rng: random.Random) -> Record:
    """Three pictures with text before, between and after them."""
    content = [text_part("First ")]
    for number, then in enumerate((", then ", ", then ", ".")):
        digit = rng.randrange(10)
        picture = _save(raw, f"{name}_{number}", {next(_cells(rng)): digit}, rng)
        content += [picture, text_part(f"{digit}{then}")]
    return {"content": content}


def _cells(rng: random.Random) -> Iterator[Cell]:
    """All cells, in any order."""
    return iter(rng.sample([(row, column) for row in range(3) for column in range(3)], 9))


def _board(digits: Mapping[Cell, int], rng: random.Random) -> NDArray[np.uint8]:
    """(SIDE, SIDE) grey, with scans of training's share."""
    scans, _ = load_scans()
    board = np.full((SIDE, SIDE), 30, dtype=np.uint8)
    for (row, column), digit in digits.items():
        scan = scans.images[rng.choice(np.flatnonzero(scans.digits == digit).tolist())]
        large = Image.fromarray(scan).resize((CELL, CELL), Image.Resampling.BICUBIC)
        cell = board[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        np.maximum(cell, np.asarray(large), out=cell)
    return board


def _save(raw: Path, name: str, digits: Mapping[Cell, int], rng: random.Random) -> Record:
    """Draws a picture into ``raw``; the part of a record that shows it."""
    path = f"images/{name}.png"
    Image.fromarray(_board(digits, rng)).save(raw / path, compress_level=1)
    return {"type": "image", "image": path}


def _write_video(path: Path, frames: list[NDArray[np.uint8]]) -> None:
    """MPEG-4 by one thread, so the bytes are the same each time."""
    import av  # late: it loads ffmpeg

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.bit_rate = 400_000
        stream.codec_context.thread_count = 1
        for frame in frames:
            colours = np.repeat(frame[:, :, None], 3, axis=2)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(colours, format="rgb24")))
        file.mux(stream.encode())

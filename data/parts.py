r"""What a content is made of, and its ids: text, media, places in an image, calls of tools.

    {"type": "text", "text": "A cat."}              A cat.
    {"type": "image", "image": "cat.jpg"}           <|vision_start|><|image_pad|><|vision_end|>
    {"type": "video", "video": "clip.mp4", "video_start": 2, "video_end": 4.5}
                                        <|vision_start|><|video_pad|><|vision_end|>, seconds of it
    {"type": "ref", "text": "the cat"}              <|object_ref_start|>the cat<|object_ref_end|>
    {"type": "box", "box": [10, 20, 300, 400]}      <|box_start|>(10,20),(300,400)<|box_end|>
    {"type": "quad", "quad": [1, 2, 9, 2, 9, 8, 1, 8]}
                                        <|quad_start|>(1,2),(9,2),(9,8),(1,8)<|quad_end|>
    {"type": "call", "name": "tap", "arguments": {"x": 5}}
                                        ✿FUNCTION✿: tap\n✿ARGS✿: {"x": 5}

Special tokens come from parts alone: a text that spells one keeps its characters. Coordinates are
integers in [0, 1000), whatever the image's size.

Source: arXiv 2409.12191 section 2.2; the form of calls is that of Qwen-Agent's QwenFnCallPrompt.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from triptych.configs.model_schema import TokensConfig
from triptych.data.media.kinds import KINDS
from triptych.data.tokenizer import Tokenizer
from triptych.data.types import Clip, MediaKind
from triptych.errors import DataError

COORDINATES = 1000
"""Places run from 0 to one less."""
FUNCTION, ARGS = "✿FUNCTION✿", "✿ARGS✿"
SHAPES = {"box": 4, "quad": 8}
"""Parts of coordinates x, y, x, y, ..., and how many they have."""
CLIP = ("video_start", "video_end")
"""Seconds of a video, as qwen-vl-utils calls them."""
KEYS = {
    "text": ("text",),
    "ref": ("text",),
    "call": ("name", "arguments"),
    **{name: (name,) for name in (*SHAPES, *(kind.name.lower() for kind in MediaKind))},
    "video": ("video", *CLIP),
}
"""Type of a part -> its keys."""
MAX_START_S = 4.5 * 3600
"""What the index has room for, rounded down."""


@dataclass(frozen=True, slots=True)
class MediaBytes:
    """A media item that came with its record."""

    name: str
    """As it was called; may be empty."""
    content: bytes
    file: Path | None = None
    """The webdataset shard that it is a member of, and stays in."""
    offset: int = 0
    """Bytes from the start of that shard to the content."""


class MediaRef(NamedTuple):
    """A media item that a record names."""

    kind: MediaKind
    path: str | MediaBytes
    clip: Clip | None = None
    """None for all of it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record as ids, its media not yet read."""

    input_ids: NDArray[np.int32]
    """(num_tokens,) with one placeholder per media item."""
    targets: NDArray[np.uint8]
    """(num_tokens,) 1 where the token itself is a target (not shifted)."""
    media: tuple[MediaRef, ...]
    """In order of appearance."""


class SequenceWriter:
    """Collects ids. Text that continues text is encoded with it, as one string would be."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = tokenizer.tokens
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._targets: list[bool] = []
        self._media: list[MediaRef] = []
        self._text, self._text_is_target = "", False

    @property
    def has_targets(self) -> bool:
        """Whether there is anything to learn yet."""
        self._flush()
        return any(self._targets)

    def text(self, text: str, *, target: bool) -> None:
        """Add characters."""
        if target != self._text_is_target:
            self._flush()
        self._text += text
        self._text_is_target = target

    def special(self, token: int, *, target: bool = False) -> None:
        """Add a special token by its id."""
        self._flush()
        self._ids.append(token)
        self._targets.append(target)

    def between(self, name: str, text: str, *, target: bool) -> None:
        """Add a text between the special tokens ``<|name_start|>`` and ``<|name_end|>``."""
        self.special(self._tokenizer.special(f"{name}_start"), target=target)
        self.text(text, target=target)
        self.special(self._tokenizer.special(f"{name}_end"), target=target)

    def media(self, kind: MediaKind, path: str | MediaBytes, clip: Clip | None) -> None:
        """Add a media item; it is never a target."""
        self.special(self.tokens.vision_start)
        self.special(pads(self.tokens)[kind])
        self.special(self.tokens.vision_end)
        self._media.append(MediaRef(kind, path, clip))

    def finish(self) -> Encoded:
        """All that was added."""
        self._flush()
        return Encoded(
            np.array(self._ids, dtype=np.int32),
            np.array(self._targets, dtype=np.uint8),
            tuple(self._media),
        )

    def _flush(self) -> None:
        ids = self._tokenizer.encode(self._text) if self._text else []
        self._ids += ids
        self._targets += [self._text_is_target] * len(ids)
        self._text = ""


def pads(tokens: TokensConfig) -> dict[MediaKind, int]:
    """The placeholder of each kind of media."""
    return {MediaKind.IMAGE: tokens.image_pad, MediaKind.VIDEO: tokens.video_pad}


def write_content(writer: SequenceWriter, content: Any, where: str, *, target: bool) -> None:
    """Add a content: a string or a list of parts, calls excepted.

    Raises:
        DataError: a part is malformed; names ``where`` it stands.
    """
    for i, part in enumerate(parts_of(content, where)):
        if part.get("type") == "call":
            raise DataError(f"{where}[{i}] is a call, which only a turn of the assistant can make")
        write_part(writer, part, f"{where}[{i}]", target=target)


def parts_of(content: Any, where: str) -> list[Any]:
    """The parts of a content; of a string, itself."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise DataError(f"{where} must be a string or a list of parts")
    return [part if isinstance(part, Mapping) else {} for part in content]


def write_part(
    writer: SequenceWriter, part: Mapping[str, Any], where: str, *, target: bool
) -> None:
    """Add one part."""
    name = part.get("type")
    if name in SHAPES:
        writer.between(name, _points(part.get(name), name, where), target=target)
        return
    kind = _media_kind(name, where)
    if name == "call":
        writer.text(_call(part, where), target=target)
        return
    key = KEYS[str(name)][0]
    value = part.get(key)
    if kind is not None and isinstance(value, str | MediaBytes):
        writer.media(kind, value, _clip(part, where))
    elif not isinstance(value, str):
        raise DataError(f"{where} of type {name} needs a string under the key {key!r}")
    elif name == "ref":
        writer.between("object_ref", value, target=target)
    else:
        writer.text(value, target=target)


def _media_kind(name: Any, where: str) -> MediaKind | None:
    """What a part of this type shows; None for what is no media item."""
    for code, kind in KINDS.items():
        if kind.name == name:
            return code
    if not isinstance(name, str) or name not in KEYS:
        shown = [kind.name for kind in KINDS.values()]
        known = ", ".join(["text", *shown, "ref", *SHAPES])
        raise DataError(f"{where}.type is {name!r}; it must be {known} or call")
    return None


def _clip(part: Mapping[str, Any], where: str) -> Clip | None:
    """What of a video is meant; None for all of it."""
    given = [part.get(key) for key in CLIP]
    if part["type"] != "video" or given == [None, None]:
        return None
    start, end = given[0] or 0, given[1]
    seconds = [value for value in (start, end) if value is not None]
    if not all(type(value) in {int, float} and 0 <= value < MAX_START_S for value in seconds):
        raise DataError(
            f"{where}: video_start and video_end are {start!r} and {end!r}; they must be seconds "
            f"from 0 to {MAX_START_S}  -> cut a longer video into files"
        )
    start_ms, *end_ms = (round(1000 * value) for value in seconds)
    if end_ms and start_ms >= end_ms[0]:
        raise DataError(f"{where}: video_start={start} must be before video_end={end}")
    return Clip(start_ms, end_ms[0] if end_ms else None)


def _points(values: Any, name: str, where: str) -> str:
    """``(x,y),(x,y)``; two corners of a box are the upper left and the lower right one."""
    number = SHAPES[name]
    if not isinstance(values, list | tuple) or [type(v) for v in values] != [int] * number:
        raise DataError(f"{where} of type {name} needs {number} whole numbers under {name!r}")
    if not all(0 <= value < COORDINATES for value in values):
        raise DataError(
            f"{where} is {name} {list(values)}: coordinates lie in [0, {COORDINATES})"
            f"  -> scale x by {COORDINATES} / width, y by {COORDINATES} / height, and round down"
        )
    if name == "box" and not (values[0] <= values[2] and values[1] <= values[3]):
        raise DataError(
            f"{where} is box {list(values)}: its first corner must be the upper left one"
            "  -> [x1, y1, x2, y2], x1 <= x2, y1 <= y2"
        )
    return ",".join(f"({x},{y})" for x, y in zip(values[::2], values[1::2], strict=True))


def _call(part: Mapping[str, Any], where: str) -> str:
    name, arguments = part.get("name"), part.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str | Mapping):
        raise DataError(f"{where} of type call needs a name, and arguments: an object or a string")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    line_end = "\n" if arguments.startswith("```") else " "
    return f"{FUNCTION}: {name}\n{ARGS}:{line_end}{arguments}"

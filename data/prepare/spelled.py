"""Places in an image that a text spells out, as published sets have them.

    <|object_ref_start|>the cat<|object_ref_end|><|box_start|>(10,20),(300,400)<|box_end|>
    <ref>the cat</ref><box>(10,20),(300,400)</box>      of the first Qwen-VL; the same tokens

They are read only where that is asked for: text of an unknown source never makes special tokens.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from triptych.data.parts import SHAPES
from triptych.data.tokenizer import SPECIAL_TOKENS
from triptych.errors import DataError

_PLACE = re.compile(
    r"<\|(?P<a>object_ref|box|quad)_start\|>(?P<b>.*?)<\|(?P=a)_end\|>"
    r"|<(?P<c>ref|box|quad)>(?P<d>.*?)</(?P=c)>",
    re.DOTALL,
)
_TAG = re.compile(r"<\|(?:object_ref|box|quad)_(?:start|end)\|>|</?(?:ref|box|quad)>")
_POINTS = re.compile(r"\(\d+,\s*\d+\)(?:,\s*\(\d+,\s*\d+\))*")
_SPECIAL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))


def special_in(record: Any) -> set[str]:
    """Special tokens that the texts of a record spell, and that stay ordinary characters."""
    return {token for text in _texts(record) for token in _SPECIAL.findall(text)}


def with_places(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose texts have their places as parts.

    Raises:
        DataError: a place is opened and not closed, or is none.
    """
    made = dict(record)
    if "text" in made and isinstance(made["text"], str) and _TAG.search(made["text"]):
        made["content"] = made.pop("text")
    if "content" in made:
        made["content"] = _content(made["content"])
    if isinstance(made.get("messages"), list):
        made["messages"] = [
            {**turn, "content": _content(turn["content"])}
            if isinstance(turn, Mapping) and "content" in turn
            else turn
            for turn in made["messages"]
        ]
    return made


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return list(_parts(content)) if _TAG.search(content) else content
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        text = part.get("text") if is_text else None
        parts += _parts(text) if isinstance(text, str) else [part]
    return parts


def _parts(text: str) -> Iterator[dict[str, Any]]:
    end = 0
    for place in _PLACE.finditer(text):
        yield from _plain(text[end : place.start()])
        name, inner = place["a"] or place["c"], place["b"] if place["a"] else place["d"]
        if name in SHAPES:
            if not _POINTS.fullmatch(inner.strip()):
                raise DataError(f"{place[0][:80]!r} spells no {name}: points are (x,y),(x,y)")
            numbers = [int(number) for number in re.findall(r"\d+", inner)]
            for first in range(0, len(numbers), SHAPES[name]):
                yield {"type": name, name: numbers[first : first + SHAPES[name]]}
        else:
            yield {"type": "ref", "text": inner}
        end = place.end()
    yield from _plain(text[end:])


def _plain(text: str) -> Iterator[dict[str, Any]]:
    if stray := _TAG.search(text):
        raise DataError(f"{stray[0]} is opened or closed alone, in {text[:80]!r}")
    if text:
        yield {"type": "text", "text": text}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)

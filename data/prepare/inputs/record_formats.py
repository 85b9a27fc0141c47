"""Records as other tools write them, made into ours (docs/data-format.md).

What a format does not name stays in the record, so that a key that nothing reads is still refused.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from triptych.data.prepare.inputs.openai_chats import OF_OPENAI, from_openai
from triptych.data.prepare.inputs.web_documents import (
    MEDIA,
    OF_OBELICS,
    Record,
    from_interleaved,
    from_mmc4,
    from_obelics,
    media_part,
)
from triptych.errors import DataError

MARKS = re.compile(r"<(image|video)>")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "system": "system",
    "function_call": "tool_call",
    "observation": "tool_response",
}
"""``from`` of ShareGPT and its kin -> role."""


class RecordFormat(NamedTuple):
    """A way to write a sample."""

    name: str
    is_it: Callable[[Record], bool]
    convert: Callable[[Record], Record]


def _from_swift(record: Record) -> Record:
    """Chats with marks in their text, media beside them."""
    turns = record.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError("messages must be a list of turns")
    return {**_without(record, "messages"), "messages": _merge_calls(_place(record, turns))}


def _from_sharegpt(record: Record) -> Record:
    """Chats of ``from`` and ``value``, human and gpt in turns."""
    turns = []
    previous = ""
    conversations = record.get("conversations")
    if not isinstance(conversations, list):
        raise DataError("conversations must be a list of turns")
    for i, turn in enumerate(conversations):
        where = f"conversations[{i}]"
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise DataError(f"{where} must be an object with from and value")
        role = SPEAKERS.get(str(turn["from"]))
        if role is None:
            raise DataError(f"{where} is from {turn['from']!r}; known are {', '.join(SPEAKERS)}")
        if role == previous and role in {"user", "assistant"}:
            raise DataError(f"{where} is from {turn['from']}, as is the one before: out of order")
        if (role == "system" and i) or (role == "assistant" and previous in {"", "system"}):
            raise DataError(f"{where} is from {turn['from']}: turns are out of order")
        previous = role
        rest = {key: value for key, value in turn.items() if key not in {"from", "value"}}
        turns.append({**rest, "role": role, "content": turn["value"]})
    return {**_without(record, "conversations"), "messages": _merge_calls(_place(record, turns))}


def _from_pair(record: Record) -> Record:
    """An image and its caption."""
    names = [name for name in ("text", "caption") if name in record]
    media = list(_media(record))
    if len(names) != 1 or len(media) != 1:
        raise DataError(f"a pair has one image or video and one text; found {len(media)}, {names}")
    return {
        **_without(record, names[0]),
        "content": [media[0], {"type": "text", "text": record[names[0]]}],
    }


FORMATS = {
    record_format.name: record_format
    for record_format in (
        RecordFormat("sharegpt", lambda record: "conversations" in record, _from_sharegpt),
        RecordFormat(
            "openai",
            lambda record: any(OF_OPENAI & turn.keys() for turn in _turns(record)),
            from_openai,
        ),
        RecordFormat(
            "ms-swift",
            lambda record: "messages" in record and (_has_media(record) or _has_tool_calls(record)),
            _from_swift,
        ),
        RecordFormat(
            "mmc4", lambda record: {"text_list", "image_info"} <= record.keys(), from_mmc4
        ),
        RecordFormat(
            "obelics",
            lambda record: "texts" in record and bool(OF_OBELICS & record.keys()),
            from_obelics,
        ),
        RecordFormat("interleaved", lambda record: "texts" in record, from_interleaved),
        RecordFormat(
            "pair",
            lambda record: _has_media(record) and bool({"text", "caption"} & record.keys()),
            _from_pair,
        ),
        RecordFormat("triptych", lambda record: True, lambda record: record),
    )
}
"""Name -> format. The first that fits; ours is the last."""


def convert(record: Any, name: str | None, ignored: frozenset[str]) -> tuple[str, Any]:
    """The name of a record's format, and the record as ours.

    Args:
        record: as it was read.
        name: of a format, or None for the first that fits.
        ignored: keys that are passed over.

    Raises:
        DataError: the record is malformed in its format.
    """
    if not isinstance(record, Mapping):
        return "triptych", record
    seen = {key: value for key, value in record.items() if key not in ignored}
    found = FORMATS[name] if name else next(f for f in FORMATS.values() if f.is_it(seen))
    try:
        return found.name, found.convert(seen if found.name != "triptych" else record)
    except DataError as error:
        raise DataError(f"read as {found.name}: {error}") from error


def _place(record: Record, turns: Sequence[Record]) -> list[dict[str, Any]]:
    """Turns with a part for each mark in their text; as many marks as media, kind by kind."""
    media = list(_media(record))
    queues = {kind: iter([part for part in media if part["type"] == kind]) for kind in MEDIA}
    placed = [_place_in(turn, queues) for turn in turns]
    text = "".join(c for turn in turns if isinstance(c := turn.get("content"), str))
    for kind in MEDIA:
        num_marks = len(re.findall(f"<{kind}>", text))
        num_media = sum(part["type"] == kind for part in media)
        if num_marks != num_media:
            raise DataError(
                f"{num_marks} marks <{kind}> in the text, {num_media} {kind}s beside it"
                "  -> one mark where each shall stand"
            )
    return placed


def _place_in(turn: Record, queues: Mapping[str, Iterator[Record]]) -> dict[str, Any]:
    content = turn.get("content")
    if not isinstance(content, str) or not MARKS.search(content):
        return dict(turn)
    parts: list[Record] = []
    pieces = MARKS.split(content)
    for text, kind in zip(pieces[::2], [*pieces[1::2], None], strict=True):
        parts += [{"type": "text", "text": text}] if text else []
        item = next(queues[kind], None) if kind else None
        parts += [item] if item else []
    return {**turn, "content": parts}


def _merge_calls(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Roles ``tool_call`` and ``tool_response``: calls join the turn of the assistant."""
    merged: list[dict[str, Any]] = []
    for turn in turns:
        role, content = turn.get("role"), turn.get("content")
        if role == "tool_call":
            if not (merged and merged[-1].get("role") == "assistant"):
                merged.append({"role": "assistant", "content": []})
            said = merged[-1]["content"]
            said = [{"type": "text", "text": said}] if isinstance(said, str) else said
            merged[-1]["content"] = [*said, _call_of(content)]
        else:
            merged.append({**turn, "role": "tool"} if role == "tool_response" else turn)
    return merged


def _call_of(content: Any) -> Record:
    try:
        call = json.loads(content)
        return {"type": "call", "name": call["name"], "arguments": call["arguments"]}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"a tool_call must be JSON with name and arguments, not {str(content)[:80]!r}"
        ) from error


def _media(record: Record) -> Iterator[Record]:
    """The media beside the text, as parts."""
    for kind, keys in MEDIA.items():
        for key in keys:
            found = record.get(key)
            for item in found if isinstance(found, list) else [found] if found else []:
                yield media_part(kind, item)


def _has_media(record: Record) -> bool:
    return any(record.get(key) for keys in MEDIA.values() for key in keys)


def _has_tool_calls(record: Record) -> bool:
    roles = {str(turn.get("role")) for turn in _turns(record)}
    return bool({"tool_call", "tool_response"} & roles)


def _turns(record: Record) -> list[Record]:
    turns = record.get("messages")
    found = turns if isinstance(turns, list) else []
    return [turn for turn in found if isinstance(turn, Mapping)]


def _without(record: Record, key: str) -> dict[str, Any]:
    """The record without this key and the media, which have been read."""
    read = {key, *(name for names in MEDIA.values() for name in names)}
    return {name: value for name, value in record.items() if name not in read}

"""What other tools write: told by its first bytes or its keys, and refused with what to do.

A record has one of the keys ``messages``, beside which ``tools`` may stand, ``content`` and
``text``, a turn has ``role`` and ``content``, a part has ``type`` and the key that its type names.
Whatever else is there would be passed over in silence, and a model that never sees its pictures
trains all the same.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from triptych.data.parts import KEYS
from triptych.errors import DataError

KINDS_OF_RECORD = frozenset({"messages", "content", "text"})
UNDERSTOOD = frozenset({"id"})
"""Keys that may stand in any record: they say nothing to train on."""
PART = '{"type": "image", "image": PATH}'

SPELLED_MEDIA = re.compile(
    r"<(?:image|video|audio)(?:[ _]?\d+)?>|<img>|<\|(?:image|video)_pad\|>|<(?:Image|Video)Here>"
)
"""What other tools write into text where a picture or video shall stand."""
BASE64 = re.compile(r"data:.*|[A-Za-z0-9+/]{256,}={0,2}", re.DOTALL)


class Foreign(NamedTuple):
    """A format that is not ours."""

    name: str
    is_it: Callable[[Any], bool]
    remedy: str


HEADS = (
    Foreign(
        "compressed",
        lambda head: head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\3\4")),
        "unpack it first",
    ),
)
"""Files, by their first bytes."""

RECORDS = (
    Foreign(
        "ShareGPT's, with from and value",
        lambda record: any({"from", "value"} <= turn.keys() for turn in _turns(record)),
        'write from: human as "role": "user", from: gpt as "role": "assistant", value as content',
    ),
    Foreign(
        "Alpaca's, with instruction and output",
        lambda record: {"instruction", "output"} <= record.keys(),
        "write instruction and input as a turn of user in messages, output as one of assistant",
    ),
    Foreign(
        "webdataset's, with __key__",
        lambda record: "__key__" in record,
        f"write the caption as text and the file beside it as {PART}, both as parts of content",
    ),
)
"""Records, by their keys; the first that fits."""

PARTS = (
    Foreign(
        "OpenAI's, with image_url",
        lambda part: "image_url" in part or part.get("type") == "input_image",
        f"save the picture as a file, and write {PART}",
    ),
    Foreign(
        "a picture spelled out in base64",
        lambda part: _is_base64(part.get("image")),
        f"save the picture as a file, and write {PART}",
    ),
)
"""Parts of a content, by their keys and values."""


class Allowed(NamedTuple):
    """What is let pass although it is most often a mistake."""

    keys: frozenset[str] = frozenset()
    """Keys of records, turns and parts that are passed over."""
    spelled_media: bool = False
    """Text may spell ``<image>``, ``<video>`` and the like."""


NOTHING = Allowed()


def check_record(record: Any, allowed: Allowed) -> None:
    """Refuses what would be passed over in silence. What is malformed is for the encoder.

    Raises:
        DataError: it is written as another tool has it, has a key that nothing reads, or spells
            media in its text; says how it is written here.
    """
    if not isinstance(record, Mapping):
        return
    refuse(RECORDS, {k: v for k, v in record.items() if k not in allowed.keys}, "the record is")
    if KINDS_OF_RECORD & record.keys():
        besides = UNDERSTOOD | ({"tools"} if "messages" in record else set())
        _check_keys(record, KINDS_OF_RECORD | besides, "the record", allowed)
    for where, content in _contents(record, allowed):
        for i, part in enumerate(content):
            if isinstance(part, Mapping):
                refuse(PARTS, part, f"{where}[{i}] is")
                name = str(part.get("type"))
                _check_keys(part, {"type", *KEYS.get(name, (name,))}, f"{where}[{i}]", allowed)
            text = part.get("text") if isinstance(part, Mapping) else part
            found = SPELLED_MEDIA.search(text) if isinstance(text, str) else None
            if found and not allowed.spelled_media:
                raise DataError(
                    f"{where} spells {found[0]} in its text, which shows the model nothing"
                    f"  -> write {PART} there; if it is meant as text, --allow-spelled-media"
                )


def _contents(record: Mapping[str, Any], allowed: Allowed) -> Iterator[tuple[str, Sequence[Any]]]:
    """Where a content stands, and its parts: of a string, itself."""
    for name in ("text", "content"):
        yield name, _listed(record.get(name))
    for i, turn in enumerate(_turns(record)):
        _check_keys(turn, {"role", "content"}, f"messages[{i}]", allowed)
        yield f"messages[{i}].content", _listed(turn.get("content"))


def _listed(content: Any) -> Sequence[Any]:
    return content if isinstance(content, list) else [content]


def _turns(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    turns = _listed(record.get("messages"))
    return [turn for turn in turns if isinstance(turn, Mapping)]


def _is_base64(value: Any) -> bool:
    if isinstance(value, Mapping):  # as datasets writes an image: {"bytes": ..., "path": ...}
        return "bytes" in value
    return isinstance(value, str) and BASE64.fullmatch(value) is not None


def _check_keys(
    found: Mapping[str, Any], known: Collection[Any], where: str, allowed: Allowed
) -> None:
    unknown = [str(key) for key in found if key not in known and key not in allowed.keys]
    if unknown:
        raise DataError(
            f"{where} has {', '.join(unknown)} besides, which nothing reads"
            f"  -> if that is meant, --ignore-keys {' '.join(unknown)}"
        )


def refuse(formats: Sequence[Foreign], found: Any, what: str) -> None:
    """Refuses what is of one of these formats.

    Raises:
        DataError: says of which, and what to do.
    """
    for foreign in formats:
        if foreign.is_it(found):
            raise DataError(f"{what} {foreign.name}  -> {foreign.remedy}")

r"""From chats and documents to token ids, and which of them are targets.

    chat       <|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n
               <|im_start|>assistant\nA cat.<|im_end|>\n        targets: A cat.<|im_end|>
    document   <|vision_start|><|image_pad|><|vision_end|>A cat.<|endoftext|>
                                                                targets: A cat.<|endoftext|>

A dataset stores one placeholder per image or video; :func:`expand` repeats it when resolution
limits are known. Where the paper is silent the choice is ours: documents, captions and plain text
are targets to their ``<|endoftext|>``; the line end after ``<|im_end|>`` is none; vision start, end
and pads never are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triptych.configs.model_schema import ModelConfig, TokensConfig
from triptych.data.media.kinds import KINDS, kind_of
from triptych.data.tokenizer import SYSTEM_PROMPT, Tokenizer
from triptych.data.types import MediaKind, Sample
from triptych.errors import DataError

ROLES = ("system", "user", "assistant")


class MediaRef(NamedTuple):
    """A media item that a record names."""

    kind: MediaKind
    path: str


@dataclass(frozen=True, slots=True)
class Encoded:
    """A record as ids, its media not yet read."""

    input_ids: NDArray[np.int32]
    """(num_tokens,) with one placeholder per media item."""
    targets: NDArray[np.uint8]
    """(num_tokens,) 1 where the token itself is a target (not shifted)."""
    media: tuple[MediaRef, ...]
    """In order of appearance."""


def encode_record(record: Mapping[str, Any], tokenizer: Tokenizer) -> Encoded:
    """Encodes a line of JSONL, which has one of the keys ``messages``, ``content`` and ``text``.

    Raises:
        DataError: the record has none of these keys or several, or its content is malformed.
    """
    encoders = {"messages": encode_chat, "content": encode_document, "text": encode_document}
    if not isinstance(record, Mapping):
        raise DataError(f"a record must be an object, not {type(record).__name__}")
    keys = [key for key in encoders if key in record]
    if len(keys) != 1:
        raise DataError(
            "a record needs one of the keys messages, content and text; "
            f"this one has {', '.join(record) or 'none'}"
        )
    if keys == ["text"] and not isinstance(record["text"], str):
        raise DataError(f"text must be a string, not {type(record['text']).__name__}")
    return encoders[keys[0]](record[keys[0]], tokenizer)


def encode_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Encoded:
    """Encodes ChatML. Targets are what the assistant says, and the ``<|im_end|>`` it closes with.

    Args:
        messages: ``{"role": ..., "content": ...}``; content is a string or a list of
            ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": path}``.
        tokenizer: for the text.
    Raises:
        DataError: a turn is malformed, or none is the assistant's.
    """
    writer = _Writer(tokenizer)
    _write_turns(writer, messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("messages have no assistant turn: there is nothing to learn from them")
    return writer.finish()


def encode_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Encoded:
    """Encodes ChatML up to where the assistant's answer begins; nothing is a target."""
    writer = _Writer(tokenizer)
    _write_turns(writer, messages)
    writer.special(tokenizer.tokens.im_start)
    writer.text("assistant\n", target=False)
    prompt = writer.finish()
    return Encoded(prompt.input_ids, np.zeros_like(prompt.targets), prompt.media)


def encode_document(content: str | Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Encoded:
    """Encodes pretraining data: plain text, an image and its caption, or an interleaved article.

    Raises:
        DataError: a part is malformed, or there is no text.
    """
    writer = _Writer(tokenizer)
    _write_content(writer, content, "content", target=True)
    if not writer.has_targets:
        raise DataError("a document without text: there is nothing to learn from it")
    writer.special(tokenizer.tokens.endoftext, target=True)
    return writer.finish()


def _write_turns(writer: "_Writer", messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError("messages must be a list of turns, and not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"messages[{i}] must be an object with role and content")
        role = message["role"]
        if role not in ROLES:
            raise DataError(f"messages[{i}].role is {role!r}; it must be one of {', '.join(ROLES)}")
        if i == 0 and role != "system":
            _write_turn(writer, "system", SYSTEM_PROMPT, "")
        _write_turn(writer, role, message["content"], f"messages[{i}].content")


def _write_turn(writer: "_Writer", role: str, content: Any, where: str) -> None:
    answers = role == "assistant"
    writer.special(writer.tokens.im_start)
    writer.text(f"{role}\n", target=False)
    _write_content(writer, content, where, target=answers)
    writer.special(writer.tokens.im_end, target=answers)
    writer.text("\n", target=False)


def _write_content(writer: "_Writer", content: Any, where: str, *, target: bool) -> None:
    if isinstance(content, str):
        writer.text(content, target=target)
        return
    if not isinstance(content, list | tuple):
        raise DataError(f"{where} must be a string or a list of parts")
    for i, part in enumerate(content):
        name = part.get("type") if isinstance(part, Mapping) else None
        kind = _media_kind(name, f"{where}[{i}]")
        value = part.get(name)
        if not isinstance(value, str):
            raise DataError(f"{where}[{i}] of type {name} needs a string under the key {name!r}")
        if kind is None:
            writer.text(value, target=target)
        else:
            writer.media(kind, value)


def _media_kind(name: Any, where: str) -> MediaKind | None:
    """What a part of this type shows; None for text."""
    if name == "text":
        return None
    kinds = {kind.name.lower(): kind for kind in MediaKind}
    if not isinstance(name, str) or name not in kinds:
        known = " or ".join(["text", *(kind.name for kind in KINDS.values())])
        raise DataError(f"{where}.type is {name!r}; it must be {known}")
    try:
        kind_of(kinds[name])
    except DataError as error:
        raise DataError(f"{where} is of type {name}: {error}") from error
    return kinds[name]


class _Writer:
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
        self._flush()
        return any(self._targets)

    def text(self, text: str, *, target: bool) -> None:
        if target != self._text_is_target:
            self._flush()
        self._text += text
        self._text_is_target = target

    def special(self, token: int, *, target: bool = False) -> None:
        self._flush()
        self._ids.append(token)
        self._targets.append(target)

    def media(self, kind: MediaKind, path: str) -> None:
        self.special(self.tokens.vision_start)
        self.special(_pads(self.tokens)[kind])
        self.special(self.tokens.vision_end)
        self._media.append(MediaRef(kind, path))

    def finish(self) -> Encoded:
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


def _pads(tokens: TokensConfig) -> dict[MediaKind, int]:
    """The placeholder of each kind of media."""
    return {MediaKind.IMAGE: tokens.image_pad, MediaKind.VIDEO: tokens.video_pad}


def placeholders(input_ids: NDArray[np.int32], tokens: TokensConfig) -> NDArray[np.bool_]:
    """Where the placeholders of images and videos are, (num_tokens,) bool."""
    mask: NDArray[np.bool_] = (input_ids == tokens.image_pad) | (input_ids == tokens.video_pad)
    return mask


def expand(
    sample: Sample, grid_thw: ArrayLike, model: ModelConfig
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Repeats each placeholder once per LLM token of its image or video.

    Args:
        sample: as stored.
        grid_thw: (num_media, 3), in unmerged patches, in order of appearance.
        model: ids of its special tokens, and how many patches are one token.
    Returns:
        ``input_ids`` and ``targets`` of the sample, (num_tokens,) each.
    Raises:
        DataError: the placeholders are not those of the sample's media.
    """
    grids = np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3)
    is_media = placeholders(sample.input_ids, model.tokens)
    pads = _pads(model.tokens)
    expected = [pads[item.kind] for item in sample.media]
    found = sample.input_ids[is_media].tolist()
    if found != expected or len(grids) != len(expected):
        raise DataError(
            f"{len(found)} placeholders in the text, {len(expected)} media items, {len(grids)} "
            "grids: as many of the same kinds are needed  -> prepare the dataset again"
        )
    repeats = np.ones(len(sample.input_ids), dtype=np.int64)
    repeats[is_media] = grids.prod(axis=1) // model.vision.patches_per_token
    return np.repeat(sample.input_ids, repeats), np.repeat(sample.targets, repeats)

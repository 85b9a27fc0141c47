r"""From chats and documents to token ids, and which of them are targets.

    chat       <|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n
               <|im_start|>assistant\nA cat.<|im_end|>\n        targets: A cat.<|im_end|>
    document   <|vision_start|><|image_pad|><|vision_end|>A cat.<|endoftext|>
                                                                targets: A cat.<|endoftext|>

A dataset stores one placeholder per image or video; :func:`expand` repeats it when resolution
limits are known. Where the paper is silent the choice is ours: documents, captions and plain text
are targets to their ``<|endoftext|>``; the line end after ``<|im_end|>`` is none, unless asked for;
vision start, end and pads never are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triptych.configs.model_schema import ModelConfig, TokensConfig
from triptych.data.chat import encode_chat
from triptych.data.parts import Encoded, SequenceWriter, pads, write_content
from triptych.data.tokenizer import Tokenizer
from triptych.data.types import Sample
from triptych.errors import DataError


def encode_record(
    record: Mapping[str, Any], tokenizer: Tokenizer, *, line_end_is_target: bool = False
) -> Encoded:
    """Encodes a record, which has one of the keys ``messages``, ``content`` and ``text``.

    Args:
        record: as ``docs/data-format.md`` describes it.
        tokenizer: for the text.
        line_end_is_target: of chats, see :func:`encode_chat`.

    Raises:
        DataError: the record has none of these keys or several, or its content is malformed.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record must be an object, not {type(record).__name__}")
    keys = [key for key in ("messages", "content", "text") if key in record]
    if len(keys) != 1:
        raise DataError(
            "a record needs one of the keys messages, content and text; "
            f"this one has {', '.join(record) or 'none'}"
        )
    if keys == ["messages"]:
        return encode_chat(
            record["messages"],
            tokenizer,
            tools=record.get("tools"),
            line_end_is_target=line_end_is_target,
        )
    if keys == ["text"] and not isinstance(record["text"], str):
        raise DataError(f"text must be a string, not {type(record['text']).__name__}")
    return encode_document(record[keys[0]], tokenizer)


def encode_document(content: str | Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Encoded:
    """Encodes pretraining data: plain text, an image and its caption, or an interleaved article.

    Raises:
        DataError: a part is malformed, or there is no text.
    """
    writer = SequenceWriter(tokenizer)
    write_content(writer, content, "content", target=True)
    if not writer.has_targets:
        raise DataError("a document without text: there is nothing to learn from it")
    writer.special(tokenizer.tokens.endoftext, target=True)
    return writer.finish()


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
    pad_of = pads(model.tokens)
    expected = [pad_of[item.kind] for item in sample.media]
    found = sample.input_ids[is_media].tolist()
    if found != expected or len(grids) != len(expected):
        raise DataError(
            f"{len(found)} placeholders in the text, {len(expected)} media items, {len(grids)} "
            "grids: as many of the same kinds are needed  -> prepare the dataset again"
        )
    repeats = np.ones(len(sample.input_ids), dtype=np.int64)
    repeats[is_media] = grids.prod(axis=1) // model.vision.patches_per_token
    return np.repeat(sample.input_ids, repeats), np.repeat(sample.targets, repeats)

"""Pages of text and pictures as published sets write them, made into a ``content`` in order."""

import json
from collections.abc import Mapping
from typing import Any

from triptych.errors import DataError

Record = Mapping[str, Any]
MEDIA = {"image": ("image", "images"), "video": ("video", "videos")}
"""Kind -> the keys that media stand under, beside the text."""
OF_MMC4 = frozenset(
    {"text_list", "image_info", "similarity_matrix", "url", "could_have_url_duplicate"}
)
"""What the published records have besides is nothing to train on."""
OF_OBELICS = frozenset({"metadata", "general_metadata"})


def media_part(kind: str, item: Any) -> Record:
    """A part of a media item: a path, bytes, or either as Hugging Face datasets store it."""
    if isinstance(item, Mapping) and item.get("bytes") is None and item.get("path"):
        item = item["path"]
    return {"type": kind, kind: item}


def from_interleaved(record: Record) -> Record:
    """``texts``, ``images`` and ``videos`` of one length; all but one are null at each place."""
    columns = {kind: record[keys[1]] for kind, keys in MEDIA.items() if keys[1] in record}
    columns["text"] = record.get("texts")
    if not columns.keys() & MEDIA.keys() or not all(
        isinstance(column, list) and len(column) == len(columns["text"] or ())
        for column in columns.values()
    ):
        raise DataError(
            "texts, and images or videos, must be lists of one length, null where another is not"
        )
    content = []
    for i, items in enumerate(zip(*columns.values(), strict=True)):
        row = dict(zip(columns, items, strict=True))
        there = [media_part(kind, item) for kind, item in row.items() if item is not None]
        if len(there) != 1:
            places = ", ".join(f"{kind}s[{i}]" for kind in columns)
            raise DataError(f"{places}: all but one of them must be null; {len(there)} are not")
        content += there
    return {**_without(record, {f"{kind}s" for kind in columns}), "content": content}


def from_obelics(record: Record) -> Record:
    """``interleaved`` beside what OBELICS tells of each place, in lists that JSON spells out."""
    described = record.get("metadata")
    if isinstance(described, str):
        try:
            described = json.loads(described)
        except ValueError as error:
            raise DataError(f"metadata is not JSON: {error}") from error
    texts = record.get("texts")
    if described is not None and isinstance(texts, list):
        number = len(described) if isinstance(described, list) else 0
        if number != len(texts):
            raise DataError(
                f"metadata is of {number} places, texts of {len(texts)}: the row is cut"
            )
    return from_interleaved(_without(record, OF_OBELICS))


def from_mmc4(record: Record) -> Record:
    """Sentences, and pictures that belong to one of them, which they stand before.

    Sentences are joined by blanks. Pictures of one sentence keep their order.
    """
    sentences, pictures = record.get("text_list"), record.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise DataError("text_list must be a list of strings")
    if not isinstance(pictures, list) or not all(isinstance(p, Mapping) for p in pictures):
        raise DataError("image_info must be a list of objects")
    _check_similarities(record.get("similarity_matrix"), len(pictures), len(sentences))
    before: list[list[Record]] = [[] for _ in sentences]
    for i, picture in enumerate(pictures):
        place = picture.get("matched_text_index")
        if type(place) is not int or not 0 <= place < len(sentences):
            raise DataError(
                f"image_info[{i}].matched_text_index is {place!r}; text_list has "
                f"{len(sentences)} sentences, from 0 on"
            )
        if not picture.get("image_name"):
            raise DataError(f"image_info[{i}] has no image_name, the file that it was saved as")
        before[place].append(media_part("image", picture["image_name"]))
    content: list[Record] = []
    for i, (sentence, shown) in enumerate(zip(sentences, before, strict=True)):
        follows = i + 1 < len(sentences)
        content += [*shown, {"type": "text", "text": sentence + " " * follows}]
    return {**_without(record, OF_MMC4), "content": content}


def _check_similarities(matrix: Any, num_pictures: int, num_sentences: int) -> None:
    """A row a picture, a column a sentence: where they are others, something was cut."""
    if matrix is None:
        return
    rows = [len(row) if isinstance(row, list) else 0 for row in matrix] if matrix else []
    if rows != [num_sentences] * num_pictures:
        raise DataError(
            f"similarity_matrix must have {num_pictures} rows, as image_info, of {num_sentences} "
            f"numbers, as text_list; it has {len(rows)} rows, of {sorted(set(rows))}"
        )


def _without(record: Record, keys: set[str] | frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}

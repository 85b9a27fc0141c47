"""Rows of Parquet files, pictures in them as Hugging Face datasets store them.

A picture is a column of {"bytes", "path"} or of bytes; several are a list of these.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow.parquet import ParquetFile

from triptych.data.parts import MediaBytes
from triptych.data.prepare.inputs.raw_sample import RawSample
from triptych.errors import DataError

BATCH_ROWS = 64
"""Rows that are in memory at once."""
STRINGS = ("text", "caption", "source", "id")
LISTS = ("messages", "conversations", "content", "images", "texts", "videos")
"""Columns by what they must be."""


def read_parquet(path: Path) -> Iterator[RawSample]:
    """The rows of a file as records.

    Raises:
        DataError: the file is damaged, or a column is of a type that no record has there.
    """
    try:
        file = ParquetFile(path)
        _check_columns(path, file.schema_arrow)
        num_rows = file.metadata.num_rows
        size = path.stat().st_size // max(num_rows, 1)
        number = 0
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield RawSample(path, number, size, partial(_record, row))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _record(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _value(value) for key, value in row.items() if value is not None}


def _value(value: Any) -> Any:
    """Nulls of optional fields fall away; what holds bytes is a media item."""
    if isinstance(value, bytes):
        return MediaBytes("", value)
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            name, content = value["path"] or "", value["bytes"]
            return name if content is None else MediaBytes(name, content)
        return {key: _value(item) for key, item in value.items() if item is not None}
    return value


def _check_columns(path: Path, schema: arrow.Schema) -> None:
    problems = []
    for column in schema:
        kind = column.type
        is_string = arrow.types.is_string(kind) or arrow.types.is_large_string(kind)
        is_list = arrow.types.is_list(kind) or arrow.types.is_large_list(kind)
        is_picture = arrow.types.is_struct(kind) or arrow.types.is_binary(kind) or is_string
        if column.name in STRINGS and not is_string and column.name != "id":
            problems.append(f"{column.name} is of type {kind}, not string")
        elif column.name in LISTS and not is_list and not (column.name == "content" and is_string):
            problems.append(f"{column.name} is of type {kind}, not list")
        elif column.name in {"image", "video"} and not (is_picture or is_list):
            problems.append(f"{column.name} is of type {kind}, not struct, binary or string")
    if problems:
        raise DataError(
            f"{path}: column {'; column '.join(problems)}  -> cast it, or leave the column out"
        )

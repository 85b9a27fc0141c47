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
from triptych.data.prepare.inputs.raw_sample import FileSegment, RawSample
from triptych.errors import DataError

BATCH_ROWS = 64
"""Rows that are in memory at once."""
STRINGS = ("text", "caption", "source", "id")
LISTS = ("messages", "conversations", "content", "images", "texts", "videos")
"""Columns by what they must be."""


def split_parquet(path: Path, num_bytes: int) -> Iterator[FileSegment]:
    """Row groups, as many together as have about so many bytes.

    Raises:
        DataError: the file is damaged, or a column is of a type that no record has there.
    """
    file = _open(path)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    per_row = path.stat().st_size / max(sum(groups), 1)
    start = number = rows = 0
    for i, num_rows in enumerate(groups):
        rows += num_rows
        if rows * per_row >= num_bytes or i + 1 == len(groups):
            yield FileSegment(str(path), start, i + 1, number, int(rows * per_row))
            start, number, rows = i + 1, number + rows, 0


def read_parquet(segment: FileSegment) -> Iterator[RawSample]:
    """The rows of some row groups as records.

    Raises:
        DataError: the file is damaged.
    """
    path = Path(segment.file)
    file = _open(path)
    size = path.stat().st_size // max(file.metadata.num_rows, 1)
    number = segment.number
    try:
        row_groups = range(segment.start, segment.end)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=row_groups):
            for row in batch.to_pylist():
                number += 1
                yield RawSample(path, number, size, partial(_record, row))
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _open(path: Path) -> ParquetFile:
    try:
        file = ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    _check_columns(path, file.schema_arrow)
    return file


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

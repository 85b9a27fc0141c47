"""A sample as an input has it, and where it stands."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from triptych.data.parts import MediaBytes
from triptych.errors import DataError


class FileSegment(NamedTuple):
    """Samples of one file that follow each other."""

    file: str
    start: int
    """Bytes of JSONL, row groups of Parquet; nothing of what is read whole."""
    end: int
    number: int
    """Lines or rows of the file before it."""
    size: int
    """Bytes of the file that it takes, about."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """One line, row, element or group of members, not yet looked into."""

    file: Path
    number: int
    """Counted from 1, as editors do: of the line, row, element or group."""
    size: int
    """Bytes of the file that it takes, about."""
    read: Callable[[], Any]
    """Gives the record. Raises DataError if it cannot be read."""
    source: bytes = b""
    """What people are shown of it; made of the record where it is empty."""

    @property
    def where(self) -> str:
        """File and number."""
        return f"{self.file}:{self.number}"

    def shown(self) -> bytes:
        """The record as JSON, media by their names."""
        if self.source:
            return self.source
        return json.dumps(self.read(), default=_name_of, ensure_ascii=False).encode()


def of_json(file: Path, number: int, content: bytes) -> RawSample:
    """A sample that is written as JSON."""

    def read() -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}") from error

    return RawSample(file, number, len(content), read, content.strip())


def _name_of(value: Any) -> str:
    return value.name if isinstance(value, MediaBytes) else str(value)

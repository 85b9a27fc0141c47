"""Reads JSONL line by line, and says where a line is that cannot be used."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.errors import DataError


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a JSONL file."""

    file: Path
    number: int
    """Counted from 1, as editors do."""
    content: bytes

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.file}:{self.number}"

    def parse(self) -> Any:
        """The JSON value.

        Raises:
            DataError: the line is not JSON in UTF-8.
        """
        try:
            return json.loads(self.content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}") from error


def read_lines(files: Sequence[Path]) -> Iterator[Line]:
    """The lines of all files in order; blank ones are left out.

    Raises:
        DataError: a file cannot be read.
    """
    for path in files:
        try:
            with path.open("rb") as file:
                for number, content in enumerate(file, start=1):
                    if content.strip():
                        yield Line(path, number, content)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error

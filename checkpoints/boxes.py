"""Rectangles of a stored tensor: what a rank holds of it, and what two ranks have in common."""

from collections.abc import Iterator
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle of a tensor of two dims; one of a single dim is taken for one column."""

    row: int
    column: int
    num_rows: int
    num_columns: int

    @property
    def numel(self) -> int:
        """Elements in it."""
        return self.num_rows * self.num_columns

    def overlap(self, other: "Box") -> "Box | None":
        """What lies in both."""
        row, column = max(self.row, other.row), max(self.column, other.column)
        num_rows = min(self.row + self.num_rows, other.row + other.num_rows) - row
        num_columns = min(self.column + self.num_columns, other.column + other.num_columns) - column
        if num_rows <= 0 or num_columns <= 0:
            return None
        return Box(row, column, num_rows, num_columns)


def boxes_of_range(block: Box, start: int, end: int) -> Iterator[Box]:
    """The rectangles that elements [start, end) of a block are, in the block's own order.

    Three at most: the end of a row, whole rows, the beginning of one.
    """
    width = block.num_columns
    while start < end:
        row, column = divmod(start, width)
        if column or end - start < width:
            box = Box(block.row + row, block.column + column, 1, min(width - column, end - start))
        else:
            box = Box(block.row + row, block.column, (end - start) // width, width)
        yield box
        start += box.numel


def split_range(sizes: list[int], part: int, num_parts: int) -> list[tuple[int, int]]:
    """The elements [start, end) of each of several tensors that are in one of equal parts.

    The parts are ranges of all tensors laid end to end, so that few tensors are cut.
    """
    total, offset, ranges = sum(sizes), 0, []
    first, last = total * part // num_parts, total * (part + 1) // num_parts
    for size in sizes:
        start, end = (min(max(edge - offset, 0), size) for edge in (first, last))
        ranges.append((start, end))
        offset += size
    return ranges

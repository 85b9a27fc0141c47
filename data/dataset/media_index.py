"""``media.idx``: one fixed-size row per image or video, sorted by sample, memory-mapped.

Rows hold whatever decides token counts, so resolution limits stay a training-time setting.
"""

from bisect import bisect_left
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triptych.configs.model_schema import VisionConfig
from triptych.data.dataset.text_file import check_size
from triptych.data.media.kinds import kind_of
from triptych.data.types import Media, MediaKind, PixelLimits

ROW = np.dtype(
    [
        ("sample", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("xxh3", "V16"),
        ("shard", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("frames", "<u4"),
        ("duration_ms", "<u4"),
        ("kind", "<u4"),
    ]
)
"""One media item: ``data.types.Media`` and the sample it belongs to. 64 bytes."""


def media_row(sample: int, media: Media) -> NDArray[np.void]:
    """The row of a media item, (1,) of :data:`ROW`."""
    row = np.zeros(1, dtype=ROW)
    row["sample"] = sample
    row["xxh3"] = np.void(media.xxh3)
    for name in ("offset", "size", "shard", "width", "height", "frames", "duration_ms", "kind"):
        row[name] = getattr(media, name)
    return row


class MediaIndex:
    """The rows of ``media.idx``."""

    def __init__(self, file: Path, num_rows: int) -> None:
        """Maps the file.

        Raises:
            DataError: the file is missing, or does not have ``num_rows`` rows.
        """
        check_size(file, num_rows * ROW.itemsize)
        self.rows: NDArray[np.void] = np.empty(0, dtype=ROW)
        if num_rows:
            self.rows = np.asarray(np.memmap(file, dtype=ROW, mode="r", shape=(num_rows,)))
        self._samples = self.rows["sample"]

    def of_sample(self, sample: int) -> tuple[Media, ...]:
        """The media of a sample in order of appearance; a binary search."""
        return tuple(_media(row) for row in self.rows_of(sample, sample + 1))

    def sample_of(self, media: Media) -> int | None:
        """The sample that a media item belongs to; reads every row, for error messages."""
        here = (self.rows["shard"] == media.shard) & (self.rows["offset"] == media.offset)
        found = np.flatnonzero(here)
        return int(self._samples[found[0]]) if len(found) else None

    def rows_of(self, start: int, end: int) -> NDArray[np.void]:
        """The rows of the samples from ``start`` to before ``end``; a binary search."""
        first = bisect_left(self._samples, start)
        return self.rows[first : bisect_left(self._samples, end, lo=first)]


def media_grids(
    rows: NDArray[np.void], limits: PixelLimits, vision: VisionConfig
) -> NDArray[np.int64]:
    """Grids of the media of some rows, (num_rows, 3) int64, in unmerged patches.

    Raises:
        DataError: a media item is of a kind that is not supported.
    """
    grids = np.empty((len(rows), 3), dtype=np.int64)
    kinds = np.ascontiguousarray(rows["kind"])
    for code in np.unique(kinds).tolist():
        here = kinds == code
        grids[here] = kind_of(code).grids(rows[here], limits, vision)
    return grids


def sum_by_sample(
    rows: NDArray[np.void], values: NDArray[np.int64], start: int, end: int
) -> NDArray[np.int64]:
    """A value per row, added up within each sample from ``start`` on, (end - start,) int64."""
    sums = np.zeros(end - start, dtype=np.int64)
    np.add.at(sums, rows["sample"].astype(np.int64) - start, values)
    return sums


def _media(row: np.void) -> Media:
    return Media(
        kind=MediaKind(int(row["kind"])),
        shard=int(row["shard"]),
        offset=int(row["offset"]),
        size=int(row["size"]),
        xxh3=row["xxh3"].tobytes(),
        width=int(row["width"]),
        height=int(row["height"]),
        frames=int(row["frames"]),
        duration_ms=int(row["duration_ms"]),
    )

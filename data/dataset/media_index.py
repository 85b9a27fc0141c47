"""``media.idx``: one fixed-size row per image or video, sorted by sample.

Rows hold whatever decides token counts, so resolution limits stay a training-time setting.
"""

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from triptych.configs.model_schema import VisionConfig
from triptych.data.dataset.block_hashes import BLOCK_BYTES, CheckedFile
from triptych.data.dataset.text_file import check_size
from triptych.data.media.kinds import kind_of
from triptych.data.types import Media, MediaKind, PixelLimits
from triptych.errors import DataError

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
        ("kind", "u1"),
        ("start_high", "u1"),
        ("start_low", "<u2"),
    ]
)
"""One media item: ``data.types.Media`` and the sample it belongs to. 64 bytes; where a clip begins
has 24 bits of them, so 4 hours 39 minutes."""
_ROWS_PER_BLOCK = BLOCK_BYTES // ROW.itemsize


def media_row(sample: int, media: Media) -> NDArray[np.void]:
    """The row of a media item, (1,) of :data:`ROW`."""
    row = np.zeros(1, dtype=ROW)
    row["sample"] = sample
    row["xxh3"] = np.void(media.xxh3)
    for name in ("offset", "size", "shard", "width", "height", "frames", "duration_ms", "kind"):
        row[name] = getattr(media, name)
    row["start_high"], row["start_low"] = divmod(media.start_ms, 1 << 16)
    return row


class MediaIndex:
    """The rows of ``media.idx``, read by sample."""

    def __init__(self, file: CheckedFile, num_rows: int) -> None:
        """Reads nothing yet.

        Raises:
            DataError: the file is missing, or does not have ``num_rows`` rows.
        """
        check_size(file.path, num_rows * ROW.itemsize)
        self._file, self._num_rows = file, num_rows

    def of_sample(self, sample: int) -> tuple[Media, ...]:
        """The media of a sample in order of appearance."""
        return tuple(_media(row) for row in self.rows_of(sample, sample + 1))

    def rows_of(self, start: int, end: int) -> NDArray[np.void]:
        """The rows of the samples from ``start`` to before ``end``.

        A binary search over the first rows of blocks finds where to look; what is found there is
        checked, and so is that it was the place.

        Raises:
            DataError: the file is damaged.
        """
        starts = range(0, self._num_rows, _ROWS_PER_BLOCK)
        block = max(0, bisect_left(starts, start, key=self._first_sample) - 1)
        found = []
        for first in starts[block:]:
            last = min(first + _ROWS_PER_BLOCK, self._num_rows)
            data = self._file.read(first * ROW.itemsize, last * ROW.itemsize)
            rows = np.frombuffer(data, dtype=ROW)
            samples = rows["sample"]
            if first == starts[block] and block and samples[0] >= start:
                raise DataError(
                    f"{self._file.path} is damaged: its rows are not sorted by sample"
                    "  -> copy it again"
                )
            found.append(rows[bisect_left(samples, start) : bisect_left(samples, end)])
            if samples[-1] >= end:
                break
        if len(found) == 1:  # nearly always, and joining rows is dear
            return found[0]
        return np.concatenate([np.empty(0, dtype=ROW), *found])

    def _first_sample(self, row: int) -> int:
        return int.from_bytes(self._file.peek(row * ROW.itemsize, 8), "little")


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
        start_ms=(int(row["start_high"]) << 16) + int(row["start_low"]),
    )

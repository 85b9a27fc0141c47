"""An order of packs in a ``.npy`` file: written from a plan, or brought by a user and trained on.

    (num_samples, 3) int64        pack, source, index

Packs count from 0, and the rows of one stand together. Sources are numbered as the stage's mixture
names them; the same sample may come any number of times.
"""

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.lib import format as npy
from numpy.typing import NDArray

from triptych.data.plan.order import Cursor, Plan
from triptych.data.plan.passes import Passes, Remember, compute_anew
from triptych.data.types import Pack, SampleId
from triptych.errors import DataError

_CHUNK = 1 << 20
"""Rows that are checked at a time."""


def export_order(plan: Plan, file: Path, num_packs: int) -> int:
    """Write the first packs of a plan, fewer where it ends; returns how many."""
    cursor, num_rows = plan.start, 0
    with file.open("wb") as out:
        _write_header(out, 0)
        while cursor.num_packs < num_packs:
            packs, cursor = plan.next_packs(cursor, min(1024, num_packs - cursor.num_packs))
            rows = [(pack.number, *sample) for pack in packs for sample in pack.samples]
            out.write(np.array(rows, dtype="<i8").tobytes())
            num_rows += len(rows)
            if not packs:
                break
        out.seek(0)
        _write_header(out, num_rows)
    return cursor.num_packs


class GivenOrder(Plan):
    """The packs of a file, in its order, to its end. The file is mapped, not read into memory."""

    def __init__(self, file: Path, *, remember: Remember = compute_anew, **of_plan: Any) -> None:
        """Hashes the file, and checks every row of it, unless that is remembered.

        Args:
            file: see above.
            remember: where it is kept that all of the file was checked, beside the plan's pass.
            of_plan: what ``Plan`` takes. Samples that fit no pack may be in a source, not in the
                file.

        Raises:
            ConfigError: as ``Plan`` does.
            DataError: as ``Plan`` does; or the file is none, or names what is not there, or a pack
                that is too large.
        """
        super().__init__(remember=remember, **of_plan)
        self._file, self._rows = file, _map(file)
        digest = xxhash.xxh3_128(self.hash.encode())
        for _, rows in self._chunks():
            digest.update(rows.data)
        self.hash = digest.hexdigest()
        checked = remember(self.hash, len(self._rows), self._check)
        self.ends, self.expected_tokens = True, sum(checked.num_tokens)
        self._num_packs = int(self._rows[-1, 0]) + 1

    def next_packs(self, cursor: Cursor, num_packs: int) -> tuple[list[Pack], Cursor]:
        """The packs after a place, fewer where the file ends, and the place after them."""
        end = min(cursor.num_packs + num_packs, self._num_packs)
        if cursor != self._place(cursor.num_packs) or not 0 <= cursor.num_packs <= end:
            raise DataError(
                f"a data position before pack {cursor.num_packs} of another plan than {self._file}"
            )
        places = [self._first_row(number) for number in range(cursor.num_packs, end + 1)]
        packs = []
        for number, first, after in zip(
            range(cursor.num_packs, end), places, places[1:], strict=False
        ):
            rows = np.asarray(self._rows[first:after], dtype=np.int64)
            num_tokens, num_patches = (int(counts.sum()) for counts in self._counts(rows))
            samples = tuple(SampleId(*row) for row in rows[:, 1:].tolist())
            packs.append(Pack(number, samples, num_tokens, num_patches))
        return packs, self._place(end)

    def is_over(self, cursor: Cursor) -> bool:
        """Whether no pack comes after a place."""
        return cursor.num_packs >= self._num_packs

    def _place(self, num_packs: int) -> Cursor:
        zeros = (0,) * len(self.sources)
        return Cursor(zeros, zeros, num_packs=num_packs)

    def _first_row(self, pack: int) -> int:
        """By halves: a pack column of 10^9 rows is not read for it."""
        return bisect_left(range(len(self._rows)), pack, key=lambda row: self._rows[row, 0])

    def _counts(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(num_rows,) tokens and patches of the samples."""
        num_tokens, num_patches = np.empty((2, len(rows)), dtype=np.int64)
        for number in np.unique(rows[:, 1]).tolist():
            sizes, here = self.sources[number].sizes, rows[:, 1] == number
            sizes.check()
            num_tokens[here] = sizes.num_tokens[rows[here, 2]]
            num_patches[here] = sizes.num_patches[rows[here, 2]]
        return num_tokens, num_patches

    def _chunks(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """All rows, some at a time, (num_rows, 3) little-endian, and the number of the first."""
        for start in range(0, len(self._rows), _CHUNK):
            yield start, np.ascontiguousarray(self._rows[start : start + _CHUNK], dtype="<i8")

    def _check(self) -> Passes:
        """Look at every row; what there is of each source."""
        num_rows, num_tokens = np.zeros((2, len(self.sources)), dtype=np.int64)
        last, carried = -1, np.zeros(2, dtype=np.int64)
        for start, rows in self._chunks():
            self._check_numbers(rows, start, last)
            load = np.stack(self._counts(rows))
            packs = rows[:, 0] - rows[0, 0]
            totals = np.zeros((2, int(packs[-1]) + 1), dtype=np.int64)
            for total, counts in zip(totals, load, strict=True):
                np.add.at(total, packs, counts)
            totals[:, 0] += carried if rows[0, 0] == last else 0
            self._check_packs(totals, int(rows[0, 0]))
            np.add.at(num_rows, rows[:, 1], 1)
            np.add.at(num_tokens, rows[:, 1], load[0])
            last, carried = int(rows[-1, 0]), totals[:, -1]
        misfits: list[int | None] = [None] * len(self.sources)
        return Passes(self.hash, num_rows.tolist(), misfits, num_tokens.tolist())

    def _check_numbers(self, rows: NDArray[np.int64], start: int, last: int) -> None:
        """Packs count up by one, sources and samples exist."""
        steps = np.diff(rows[:, 0], prepend=last)
        lengths = np.array([len(source) for source in self.sources])
        known = (rows[:, 1] >= 0) & (rows[:, 1] < len(lengths))
        size = lengths[np.where(known, rows[:, 1], 0)]
        problems = {
            "packs count from 0, and the rows of one stand together": ~np.isin(steps, (0, 1)),
            f"sources are 0 to {len(lengths) - 1}, in the order of the mixture": ~known,
            "the source has no such sample": (rows[:, 2] < 0) | (rows[:, 2] >= size),
        }
        if last < 0 and rows[0, 0] != 0:
            problems = {"packs count from 0, and the rows of one stand together": steps != 1}
        for rule, wrong in problems.items():
            if wrong.any():
                row = int(wrong.argmax())
                raise DataError(
                    f"{self._file}, row {start + row}: pack, source, index = "
                    f"{rows[row].tolist()}, but {rule}"
                )

    def _check_packs(self, totals: NDArray[np.int64], first: int) -> None:
        wrong = (totals[0] > self.seq_len) | (totals[1] > self.max_patches)
        if wrong.any():
            place = int(wrong.argmax())
            raise DataError(
                f"{self._file}, pack {first + place}: {totals[0, place]} tokens and "
                f"{totals[1, place]} patches, but a pack takes train.seq_len={self.seq_len} and "
                f"data.max_patches={self.max_patches}"
            )


def _map(file: Path) -> NDArray[np.int64]:
    try:
        rows: NDArray[np.int64] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"data.order={file} cannot be read: {error}") from error
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.dtype.kind != "i" or not len(rows):
        raise DataError(
            f"data.order={file} has {rows.dtype} of shape {rows.shape}, not (num_samples, 3) int64"
            "  -> launch/prepare.py export-order writes one"
        )
    return rows


def _write_header(out: Any, num_rows: int) -> None:
    """Of the same length for any number of rows: numpy leaves room for it."""
    header = {"descr": "<i8", "fortran_order": False, "shape": (num_rows, 3)}
    npy.write_array_header_1_0(out, header)

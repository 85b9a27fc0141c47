"""Documents in megatron-core's IndexedDataset format: ``NAME.idx``, and the ids in ``NAME.bin``.

They were tokenised elsewhere, by the tokenizer that prepares them here: nothing in the files says
by which. ``data/dataset/text_file.py`` describes the bytes; here a document may have several
sequences, which are joined, and ids may be of any kind of integer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triptych.data.dataset.text_file import HEADER, check_size, unpack_header
from triptych.data.parts import Encoded
from triptych.data.prepare.inputs.raw_sample import FileSegment, RawSample
from triptych.data.tokenizer import Tokenizer
from triptych.errors import DataError

DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's codes of integers; it has others for floating point."""
_CHUNK = 1 << 20
"""Sequences that are checked at a time."""


@dataclass(frozen=True, slots=True)
class TokenisedDocument:
    """What an IndexedDataset has where other inputs have a record."""

    ids: NDArray[np.int64]
    """(num_tokens,)"""

    def encoded(self, tokenizer: Tokenizer) -> Encoded:
        """A document all of which is a target; it gets the ``<|endoftext|>`` that it lacks.

        Raises:
            DataError: it has no text, an id that the tokenizer does not have, or a placeholder.
        """
        tokens, ids = tokenizer.tokens, self.ids
        unknown = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
        if len(unknown):
            raise DataError(
                f"id {unknown[0]} is not from 0 to {tokenizer.vocab_size - 1}, the tokenizer's"
                "  -> give the tokenizer that the ids were made with as --tokenizer"
            )
        pads = ids[np.isin(ids, (tokens.image_pad, tokens.video_pad))]
        if len(pads):
            raise DataError(
                f"id {pads[0]} is the placeholder of an image or video, and there is none"
                "  -> prepare samples with media from records"
            )
        if not (ids != tokens.endoftext).any():
            raise DataError("a document without text: there is nothing to learn from it")
        if ids[-1] != tokens.endoftext:
            ids = np.append(ids, tokens.endoftext)
        return Encoded(ids.astype(np.int32), np.ones(len(ids), dtype=np.uint8), ())


class _Index:
    """``NAME.idx``, mapped."""

    def __init__(self, path: Path) -> None:
        """Checks that the file is whole.

        Raises:
            DataError: it is none, of another version or kind of ids, or cut; so is ``NAME.bin``.
        """
        self.path, self.ids = path, path.with_suffix(".bin")
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        version, code, num_sequences, num_bounds = unpack_header(header, path)
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"{path} has version {version} and dtype code {code}; version 1 and the codes of "
                f"integers, {', '.join(map(str, DTYPES))}, are read"
            )
        size = HEADER.size + 12 * num_sequences + 8 * num_bounds
        if num_sequences and path.stat().st_size == size + num_sequences:
            raise DataError(
                f"{path} is of a multimodal IndexedDataset  -> prepare its samples from records"
            )
        check_size(path, size)
        self.dtype = np.dtype(DTYPES[code])
        offsets_at, bounds_at = HEADER.size + 4 * num_sequences, size - 8 * num_bounds
        content = np.memmap(path, dtype=np.uint8, mode="r")
        self.lengths: NDArray[np.int32] = content[HEADER.size : offsets_at].view("<i4")
        self.offsets: NDArray[np.int64] = content[offsets_at:bounds_at].view("<i8")
        self.bounds: NDArray[np.int64] = content[bounds_at:size].view("<i8")
        """First sequence of each document, and the number of all."""
        self.num_bytes = 0
        if num_sequences:
            self.num_bytes = int(self.offsets[-1]) + self.dtype.itemsize * int(self.lengths[-1])
        check_size(self.ids, self.num_bytes)

    def check(self) -> None:
        """Look at every sequence and document: they follow each other without gaps.

        Raises:
            DataError: they do not.
        """
        after, is_whole = 0, True
        for start in range(0, len(self.lengths), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            sizes = self.dtype.itemsize * self.lengths[chunk].astype(np.int64)
            ends = after + np.cumsum(sizes)
            is_whole &= bool((sizes >= 0).all() and (self.offsets[chunk] == ends - sizes).all())
            after = int(ends[-1])
        bounds = self.bounds
        if not len(bounds) or bounds[0] or bounds[-1] != len(self.lengths):
            is_whole = False
        if not is_whole or (np.diff(bounds) < 0).any():
            raise DataError(
                f"{self.path} is damaged: its sequences or documents do not follow each other"
                "  -> copy it again"
            )

    def starts(self, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """The bytes at which some documents begin, given their first sequences."""
        ends_there = bounds == len(self.offsets)
        starts = np.full(len(bounds), self.num_bytes, dtype=np.int64)
        starts[~ends_there] = self.offsets[bounds[~ends_there]]
        return starts


def split_indexed(path: Path, num_bytes: int) -> Iterator[FileSegment]:
    """Documents, as many together as have about so many bytes.

    Raises:
        DataError: the index is damaged or cut, or the ids are.
    """
    index = _Index(path)
    index.check()
    starts = index.starts(index.bounds)
    first, num_documents = 0, len(index.bounds) - 1
    while first < num_documents:
        end = int(np.searchsorted(starts, starts[first] + num_bytes))
        end = min(max(end, first + 1), num_documents)
        yield FileSegment(str(path), first, end, first, int(starts[end] - starts[first]))
        first = end


def read_indexed(segment: FileSegment) -> Iterator[RawSample]:
    """Some documents.

    Raises:
        DataError: a file was cut since they were split.
    """
    path = Path(segment.file)
    index = _Index(path)
    starts = index.starts(index.bounds[segment.start : segment.end + 1]).tolist()
    with index.ids.open("rb") as file:
        file.seek(starts[0])
        for number, size in enumerate(np.diff(starts).tolist(), segment.number + 1):
            content = file.read(size)
            ids = np.frombuffer(content, dtype=index.dtype).astype(np.int64)
            yield RawSample(path, number, size, partial(TokenisedDocument, ids))

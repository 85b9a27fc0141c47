"""The files of one sample, those side by side in a shard by one request, clips of one video too.

A shard has the members of a sample one after the other, so several pictures cost an object storage
one request of the run's limit, and a disk one way to the place.
"""

from collections.abc import Sequence
from itertools import pairwise

import xxhash

from triptych.data.types import Media, Source
from triptych.errors import DataError

MAX_GAP_BYTES = 4096
"""Between two files that are read at once: the header of a tar's member is 512, or 1,536 bytes."""
MAX_BYTES = 32 << 20
"""Of what is read at once."""


class JoinedMedia:
    """Reads nothing before it is asked for."""

    def __init__(self, source: Source, media: Sequence[Media]) -> None:
        """Of a sample, in order of appearance."""
        self._source, self._media = source, media
        self._found: dict[int, bytes] = {}

    def read(self, number: int) -> bytes:
        """The encoded file of one of them; those right behind it are kept for their turn.

        Raises:
            DataError: it cannot be read, or its hash is not the recorded one.
        """
        if number not in self._found:
            self._read_run(number)
        data = self._found.pop(number, b"")
        media, *following = self._media[number : number + 2]
        if xxhash.xxh3_128_digest(data) != media.xxh3:
            data = self._source.read_media(media)
        if following and (following[0].shard, following[0].offset) == (media.shard, media.offset):
            self._found[number + 1] = data
        return data

    def _read_run(self, number: int) -> None:
        """Those that lie side by side from ``number`` on; nothing where it is alone or is cut."""
        first, end = self._media[number], number + 1
        for before, after in pairwise(self._media[number:]):
            gap = after.offset - before.offset - before.size
            size = after.offset + after.size - first.offset
            if after.shard != first.shard or not 0 <= gap <= MAX_GAP_BYTES or size > MAX_BYTES:
                break
            end += 1
        run = self._media[number:end]
        if len(run) == 1:
            return
        try:
            data = self._source.read_span(first, run[-1].offset + run[-1].size - first.offset)
        except DataError:
            return  # one of them is to blame, as reading each will show
        for place, media in enumerate(run, number):
            start = media.offset - first.offset
            self._found[place] = data[start : start + media.size]

"""Writes a dataset folder sample by sample; ``data/dataset/dataset.py`` describes its files."""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from triptych.data.dataset.dataset import ELSEWHERE, SHARD_NAME
from triptych.data.dataset.dataset_manifest import DatasetManifest, write_manifest
from triptych.data.dataset.media_index import media_row
from triptych.data.dataset.text_file import TextWriter
from triptych.data.hashed_files import hash_file
from triptych.data.media.kinds import Extent
from triptych.data.parts import Encoded
from triptych.data.tokenizer import Tokenizer
from triptych.data.types import Media, MediaKind


class ShardPlace(NamedTuple):
    """Where in a shard of somebody else's the bytes of a media item lie, and stay."""

    shard: Path
    offset: int


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A media item as it was given, verified by decoding."""

    kind: MediaKind
    content: bytes
    extension: str
    """Ending of the file name in the shard, without a point."""
    extent: Extent
    place: ShardPlace | None = None
    """None for a file that is copied into a shard of the dataset."""


class DatasetWriter:
    """The files of a dataset, which grow together."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, shard_size: int, prefix: str = ""
    ) -> None:
        """Opens the files.

        Args:
            folder: exists, and is empty.
            tokenizer: that samples are encoded with.
            shard_size: bytes after which a shard is closed.
            prefix: of the keys of its samples.
        """
        self._prefix = prefix
        self._folder = folder
        self._manifest = DatasetManifest(
            tokenizer=tokenizer.fingerprint,
            tokens=tokenizer.tokens,
            num_samples=0,
            num_tokens=0,
            num_targets=0,
            num_media=0,
            num_skipped=0,
        )
        self._text = TextWriter(folder / "text")
        self._targets = (folder / "loss.bin").open("wb")
        self._media = (folder / "media.idx").open("wb")
        self._shards = ShardWriter(folder / "shards", shard_size)

    def add(self, encoded: Encoded, media: Sequence[MediaFile], source: bytes) -> None:
        """Adds one sample.

        Args:
            encoded: its text.
            media: its media, in order of appearance.
            source: the JSON it came from; kept beside the media, for people.
        """
        sample = self._manifest.num_samples
        for item in self._shards.add(f"{self._prefix}{sample:09d}", media, source):
            self._media.write(media_row(sample, item).tobytes())
        self._text.append(encoded.input_ids)
        self._targets.write(encoded.targets.tobytes())
        self._manifest.num_samples += 1
        self._manifest.num_tokens += len(encoded.input_ids)
        self._manifest.num_targets += int(encoded.targets.sum())
        self._manifest.num_media += len(media)

    def close(self, num_skipped: int) -> DatasetManifest:
        """Completes the files and writes ``dataset.yaml`` with their hashes, last."""
        self._text.close()
        self._targets.close()
        self._media.close()
        self._shards.close()
        self._manifest.num_skipped = num_skipped
        self._manifest.shards_elsewhere = {
            str(shard): shard.stat().st_size for shard in self._shards.elsewhere
        }
        files = sorted(path for path in self._folder.rglob("*") if path.is_file())
        self._manifest.files = {
            path.relative_to(self._folder).as_posix(): hash_file(path) for path in files
        }
        write_manifest(self._manifest, self._folder)
        return self._manifest


class ShardWriter:
    """Writes media into tar files that any webdataset tool reads.

    The files of sample 12 are ``000000012.png`` and ``000000012.json``, or ``000000012.0.png``,
    ``000000012.1.png``, ... where it has several media; clips of one video are one file.
    Names are short and plain, so every header is one block of 512 bytes and the content begins
    right after it.
    """

    def __init__(self, folder: Path, shard_size: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._shard_size = shard_size
        self._number = -1
        self._file: BinaryIO | None = None
        self.elsewhere: dict[Path, int] = {}
        """Shards that are indexed in place -> their numbers."""

    def add(self, key: str, media: Sequence[MediaFile], source: bytes) -> list[Media]:
        """Writes the media of one sample into one shard."""
        if any(item.place for item in media):
            return [self._stays(item) for item in media]
        if not media:
            return []
        if self._file is None or self._file.tell() >= self._shard_size:
            self._next()
        written: list[Media] = []
        for i, item in enumerate(media):
            number = f".{i}" if len(media) > 1 else ""
            if i and item.kind is MediaKind.VIDEO and item.content is media[i - 1].content:
                offset = written[-1].offset
            else:
                offset = self._write(f"{key}{number}.{item.extension}", item.content)
            written.append(_indexed(item, self._number, offset))
        self._write(f"{key}.json", source)
        return written

    def _stays(self, item: MediaFile) -> Media:
        assert item.place is not None, "a record has all of its media in one place"
        number = self.elsewhere.setdefault(item.place.shard, ELSEWHERE + len(self.elsewhere))
        return _indexed(item, number, item.place.offset)

    def close(self) -> None:
        """Ends the last shard."""
        if self._file is not None:
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.close()
            self._file = None

    def _next(self) -> None:
        self.close()
        self._number += 1
        self._file = (self._folder / SHARD_NAME.format(self._number)).open("wb")

    def _write(self, name: str, content: bytes) -> int:
        """Returns where the content begins."""
        file = self._file
        assert file is not None
        member = tarfile.TarInfo(name)
        member.size = len(content)
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
        start = file.tell()
        file.write(content)
        file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return start


def _indexed(item: MediaFile, shard: int, offset: int) -> Media:
    return Media(
        kind=item.kind,
        shard=shard,
        offset=offset,
        size=len(item.content),
        xxh3=xxhash.xxh3_128_digest(item.content),
        **item.extent._asdict(),
    )

"""A dataset folder: what ``launch/prepare.py`` wrote, read by plan and loader.

dataset.yaml          format version, tokenizer, counts, sizes and hashes of the files below
text.bin text.idx     ids of each sample, one placeholder per image
loss.bin              uint8, parallel to text.bin: which tokens are targets
media.idx             one row per image: sample, shard, offset, size, hash, width, height
shards/000000.tar     webdataset shards
sizes/*.blocks        no part of the dataset, made again where missing: hashes by block of the above
sizes/*.sizes         made by runs, no part of the dataset: what samples count under their limits
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from triptych.configs.model_schema import TokensConfig, VisionConfig
from triptych.data.dataset.block_hashes import open_checked
from triptych.data.dataset.dataset_manifest import DatasetManifest, read_manifest
from triptych.data.dataset.media_index import MediaIndex, media_grids, sum_by_sample
from triptych.data.dataset.sizes import Columns, open_sizes
from triptych.data.dataset.text_file import TextFile, check_size
from triptych.data.hashed_files import HashedFile, differs, hash_file
from triptych.data.media.kinds import kind_of
from triptych.data.stores.media_store import Store, open_store
from triptych.data.tokens import placeholders
from triptych.data.types import Media, PixelLimits, Sample, Sizes
from triptych.errors import DataError

SHARD_NAME = "{:06d}.tar"
ELSEWHERE = 1 << 31
"""Shards are numbered from here on that lie elsewhere, as they were found."""
SHARDS = "shards"
_HASH_BYTES = 1 << 24
"""Of a shard that lies elsewhere, read at a time to verify it."""
SIZES = "sizes"
"""Folder of hashes by block and of counts, in the dataset or in ``run.dir``."""


class Dataset:
    """The samples of a dataset folder (``data.types.Source``). Threads may share it."""

    def __init__(
        self,
        path: Path,
        name: str,
        manifest: DatasetManifest,
        fingerprint: str,
        sizes_folders: Sequence[Path],
        store: Store | None,
    ) -> None:
        self.path = path
        self.name = name
        self.manifest = manifest
        self.fingerprint = fingerprint
        """Changes with any byte of the dataset."""
        self._sizes_folders = sizes_folders
        self._is_remote = store is not None
        for file, record in manifest.files.items():
            if not self._lies_elsewhere(file):
                check_size(path / file, record.size)
        self._checked = checked = open_checked(path, manifest.files, fingerprint, sizes_folders)
        self._text = TextFile(checked["text.idx"], checked["text.bin"])
        self._targets = checked["loss.bin"]
        check_size(self._targets.path, self._text.num_tokens)
        self._media = MediaIndex(checked["media.idx"], manifest.num_media)
        self._store = store or open_store(str(path / SHARDS))
        self._elsewhere = [Path(shard) for shard in manifest.shards_elsewhere]
        for shard, size in manifest.shards_elsewhere.items():
            check_size(Path(shard), size)
        self._places: dict[int, tuple[Path, Store]] = {}
        self._stores_elsewhere = {
            shard.parent: open_store(str(shard.parent)) for shard in self._elsewhere
        }

    @classmethod
    def open(
        cls,
        path: Path | str,
        name: str,
        fallback: Path | None = None,
        store: Store | None = None,
    ) -> "Dataset":
        """Opens a dataset folder; checks the size of every file.

        Text, targets and indexes are read whole, once, where their hashes by block are missing.

        Args:
            path: the folder.
            name: what the dataset is called in the mixture and in errors.
            fallback: where hashes by block and counts are written if the folder cannot be.
            store: where shards lie; None where they lie in the folder.
        Raises:
            DataError: the folder is none, incomplete, empty, or of another version.
        """
        path = Path(path)
        manifest, data = read_manifest(path)
        if not manifest.num_samples:
            raise DataError(f"{path} is empty: it has no samples  -> leave it out of the mixture")
        sizes_folders = [path / SIZES, *([fallback] if fallback else [])]
        return cls(path, name, manifest, xxhash.xxh3_128_hexdigest(data), sizes_folders, store)

    def check_tokens(self, tokens: TokensConfig, tokenizer: str) -> None:
        """Refuses a model or tokenizer that reads the ids of this dataset differently.

        Args:
            tokens: special tokens of the model.
            tokenizer: fingerprint of the tokenizer of the run.
        """
        if self.manifest.tokenizer != tokenizer:
            raise DataError(
                f"{self.path} was prepared with tokenizer {self.manifest.tokenizer}, the run has "
                f"{tokenizer}  -> set data.tokenizer to that folder, or prepare the dataset again"
            )
        ours, theirs = asdict(self.manifest.tokens), asdict(tokens)
        if ours != theirs:
            differing = [
                f"{k}={theirs[k]} (dataset: {ours[k]})" for k in ours if ours[k] != theirs[k]
            ]
            raise DataError(
                f"{self.path} has other special tokens than model.tokens: {', '.join(differing)}"
                "  -> data=NAME, with datasets prepared for this model, or the model they are for"
            )

    def verify(self, tell: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Hashes every file against ``dataset.yaml``; reads the whole dataset.

        Args:
            tell: is called with the size of each file that was read.

        Raises:
            DataError: files differ; names each.
        """
        damaged = []
        for file, record in self.manifest.files.items():
            found = self._hash(file, record.size)
            tell(found.size)
            if found != record:
                damaged.append(differs(self.path / file, found.xxh3_128, record))
        if damaged:
            raise DataError("\n".join(damaged))
        for checked in self._checked.values():
            checked.check()

    def _lies_elsewhere(self, file: str) -> bool:
        return self._is_remote and file.startswith(f"{SHARDS}/")

    def _hash(self, file: str, size: int) -> HashedFile:
        if not self._lies_elsewhere(file):
            return hash_file(self.path / file)
        digest = xxhash.xxh3_128()
        for start in range(0, size, _HASH_BYTES):
            part = min(_HASH_BYTES, size - start)
            digest.update(self._store.read(file.removeprefix(f"{SHARDS}/"), start, part))
        return HashedFile(size=size, xxh3_128=digest.hexdigest())

    def __len__(self) -> int:
        return len(self._text)

    def extents(self, start: int, end: int) -> tuple[NDArray[np.int32], NDArray[np.void]]:
        """Of the samples from ``start`` to before ``end``: text tokens of each, rows of all media.

        Returns:
            (end - start,), placeholders counted once; (num_media,) as ``media.idx`` has them.
        """
        return self._text.lengths(start, end), self._media.rows_of(start, end)

    def sizes(self, limits: PixelLimits, vision: VisionConfig) -> Sizes:
        """What every sample counts under these limits, cut into the patches of this tower.

        Memory-mapped: see ``data.dataset.sizes``.
        """
        geometry = ("patch_size", "temporal_patch_size", "spatial_merge_size")
        identity = {
            "dataset": self.fingerprint,
            **asdict(limits),
            **{name: getattr(vision, name) for name in geometry},
        }

        def count(start: int, end: int) -> Columns:
            lengths, rows = self.extents(start, end)
            grids = media_grids(rows, limits, vision)
            patches = grids.prod(axis=1)
            placeholders_more = patches // vision.patches_per_token - 1
            pairs = grids[:, 0] * (grids[:, 1] * grids[:, 2]) ** 2
            return (
                sum_by_sample(rows, placeholders_more, start, end) + lengths,
                sum_by_sample(rows, patches, start, end),
                sum_by_sample(rows, pairs, start, end),
            )

        return open_sizes(count, len(self), identity, self._sizes_folders)

    def sample(self, index: int) -> Sample:
        """Text and media references of one sample; reads no pixels.

        Raises:
            DataError: its placeholders are not as many as its media, or a file is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} samples; there is no {index}")
        span = self._text.span(index)
        ids = self._text.ids(span)
        media = self._media.of_sample(index)
        num_placeholders = int(placeholders(ids, self.manifest.tokens).sum())
        if num_placeholders != len(media):
            raise DataError(
                f"{self.path}, sample {index}: {num_placeholders} placeholders in the text, "
                f"{len(media)} media items in media.idx  -> prepare the dataset again"
            )
        targets = np.frombuffer(self._targets.read(span.start, span.stop), dtype=np.uint8)
        return Sample(ids, targets, media)

    def read_media(self, media: Media) -> bytes:
        """The encoded file.

        Raises:
            DataError: it cannot be read, or its hash is not the recorded one.
        """
        for _ in range(2):  # what was flipped on its way comes whole the second time
            data = self.read_span(media, media.size)
            if xxhash.xxh3_128_digest(data) == media.xxh3:
                break
        else:
            raise DataError(
                f"the {kind_of(media.kind).name} at byte {media.offset} of "
                f"{self._place(media)[0]} is damaged: its xxh3-128 is not the recorded one"
                "  -> copy the shard again"
            )
        return data

    def read_span(self, media: Media, size: int) -> bytes:
        """``size`` bytes of its shard from where a file begins, not compared with any hash.

        Raises:
            DataError: the shard ends before.
        """
        shard, store = self._place(media)
        return store.read(shard.name, media.offset, size)

    def _place(self, media: Media) -> tuple[Path, Store]:
        """The shard of a file, and what reads it."""
        if media.shard not in self._places:
            shard, store = self.path / SHARDS / SHARD_NAME.format(media.shard), self._store
            if media.shard >= ELSEWHERE:
                shard = self._elsewhere[media.shard - ELSEWHERE]
                store = self._stores_elsewhere[shard.parent]
            self._places[media.shard] = shard, store
        return self._places[media.shard]

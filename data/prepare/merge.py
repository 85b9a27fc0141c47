"""Datasets one after the other in one folder. Shards are linked, not copied."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triptych.data.dataset.dataset import ELSEWHERE, SHARD_NAME
from triptych.data.dataset.dataset_manifest import DatasetManifest, read_manifest, write_manifest
from triptych.data.dataset.media_index import ROW
from triptych.data.dataset.text_file import read_lengths, write_index
from triptych.data.hashed_files import HashedFile, hash_file

JOINED = ("text.bin", "loss.bin", "quarantine.jsonl")
"""Files that follow each other byte by byte."""


def merge_datasets(parts: Sequence[Path], output: Path) -> DatasetManifest:
    """Write a dataset that has the samples of all parts in order.

    The same parts give the same bytes.

    Args:
        parts: folders of datasets of one tokenizer; they may be empty, and stay as they are.
        output: an empty folder on the same file system.
    """
    manifests = [read_manifest(part)[0] for part in parts]
    (output / "shards").mkdir()
    lengths: list[NDArray[np.int32]] = []
    shards: dict[str, HashedFile] = {}
    elsewhere: dict[str, int] = {}
    num_samples = 0
    with (output / "media.idx").open("wb") as media:
        for part, manifest in zip(parts, manifests, strict=True):
            rows = np.fromfile(part / "media.idx", dtype=ROW)
            rows["sample"] += num_samples
            _renumber(rows, len(shards), manifest, elsewhere)
            media.write(rows.tobytes())
            lengths.append(read_lengths(part / "text.idx", manifest.num_samples))
            num_samples += manifest.num_samples
            names = sorted(name for name in manifest.files if name.startswith("shards/"))
            for name in names:
                new = f"shards/{SHARD_NAME.format(len(shards))}"
                _link(part / name, output / new)
                shards[new] = manifest.files[name]
    for name in JOINED:
        _join([part / name for part in parts if (part / name).exists()], output / name)
    write_index(output / "text.idx", np.concatenate(lengths))
    made = [path for path in output.iterdir() if path.is_file()]
    files = {path.name: hash_file(path) for path in made} | shards
    total = {
        name: sum(getattr(manifest, name) for manifest in manifests)
        for name in ("num_samples", "num_tokens", "num_targets", "num_media", "num_skipped")
    }
    merged = replace(
        manifests[0],
        **total,
        shards_elsewhere=elsewhere,
        files={name: files[name] for name in sorted(files)},
    )
    write_manifest(merged, output)
    return merged


def _renumber(
    rows: NDArray[np.void], num_shards: int, manifest: DatasetManifest, elsewhere: dict[str, int]
) -> None:
    """Shards get the numbers that they have in the whole; adds those ``elsewhere``."""
    old = rows["shard"].copy()
    rows["shard"] += np.where(old < ELSEWHERE, num_shards, 0).astype(np.uint32)
    for i, (shard, size) in enumerate(manifest.shards_elsewhere.items()):
        elsewhere.setdefault(shard, size)
        rows["shard"][old == ELSEWHERE + i] = ELSEWHERE + list(elsewhere).index(shard)


def _link(file: Path, name: Path) -> None:
    """A second name, or a copy where the file system has no such thing."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def _join(files: Sequence[Path], output: Path) -> None:
    if files:
        with output.open("wb") as joined:
            for path in files:
                with path.open("rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 20)

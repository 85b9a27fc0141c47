"""JSONL and image files to a dataset folder, in one pass and in constant memory.

The folder is written under a temporary name and renamed when it is complete, so a folder with its
final name is never half a dataset.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from triptych.data.dataset.dataset import Dataset, DatasetManifest
from triptych.data.media.kinds import kind_of
from triptych.data.prepare.records import Line, read_lines
from triptych.data.prepare.writer import DatasetWriter, MediaFile
from triptych.data.tokenizer import Tokenizer
from triptych.data.tokens import Encoded, MediaRef, encode_record
from triptych.errors import DataError

SHARD_SIZE = 256 << 20
"""Bytes. Small enough to copy again, large enough for a parallel file system."""
QUARANTINE = "quarantine.jsonl"


class OnBad(Enum):
    """What happens to a sample that cannot be used. It is never repaired or cut."""

    fail = "fail"
    skip = "skip"


@dataclass(slots=True)
class BuildProgress:
    """How far a dataset is."""

    num_samples: int
    num_skipped: int
    done: float
    """Share of the input bytes."""
    elapsed_s: float


def build_dataset(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: Tokenizer,
    *,
    images: Path,
    on_bad: OnBad = OnBad.fail,
    shard_size: int = SHARD_SIZE,
    report: Callable[[BuildProgress], None] | None = None,
) -> DatasetManifest:
    """Writes a dataset folder from JSONL files; images are stored byte for byte.

    Args:
        inputs: JSONL files, one record of ``data.tokens.encode_record`` per line.
        output: the folder; must not exist.
        tokenizer: for the text.
        images: folder that relative image paths start from.
        on_bad: ``skip`` leaves a bad sample out whole, and writes it to ``quarantine.jsonl``.
        shard_size: bytes after which a new shard is begun.
        report: is called after every sample.
    Raises:
        DataError: the output exists, no sample is usable, or one is bad and ``on_bad`` is ``fail``;
            names file and line.
    """
    if output.exists():
        raise DataError(f"{output} exists already  -> remove it, or choose another --output")
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        manifest = _write(inputs, partial, tokenizer, images, on_bad, shard_size, report)
        Dataset.open(partial, output.name).verify()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _write(
    inputs: Sequence[Path],
    folder: Path,
    tokenizer: Tokenizer,
    images: Path,
    on_bad: OnBad,
    shard_size: int,
    report: Callable[[BuildProgress], None] | None,
) -> DatasetManifest:
    started = time.monotonic()
    total_bytes = sum(path.stat().st_size for path in inputs if path.is_file())
    progress = BuildProgress(num_samples=0, num_skipped=0, done=0.0, elapsed_s=0.0)
    done_bytes = 0
    writer = DatasetWriter(folder, tokenizer, shard_size)
    for line in read_lines(inputs):
        try:
            encoded, media = _read_sample(line, tokenizer, images)
        except DataError as error:
            if on_bad is OnBad.fail:
                raise DataError(
                    f"{line.where}: {error}  -> mend it, or leave such samples out: --on-bad skip"
                ) from error
            _quarantine(folder / QUARANTINE, line, str(error))
            progress.num_skipped += 1
        else:
            writer.add(encoded, media, line.content.strip())
            progress.num_samples += 1
        done_bytes += len(line.content)
        progress.done = done_bytes / total_bytes
        progress.elapsed_s = time.monotonic() - started
        if report is not None:
            report(progress)
    if not progress.num_samples:
        raise DataError(
            f"{', '.join(map(str, inputs)) or 'no input'}: no usable sample, "
            f"{progress.num_skipped} bad ones  -> check the files given as --input"
        )
    return writer.close(progress.num_skipped)


def _read_sample(line: Line, tokenizer: Tokenizer, images: Path) -> tuple[Encoded, list[MediaFile]]:
    """Encodes a line and reads its media, each of which must decode."""
    encoded = encode_record(line.parse(), tokenizer)
    return encoded, [_read_media(item, images) for item in encoded.media]


def _read_media(item: MediaRef, folder: Path) -> MediaFile:
    kind = kind_of(item.kind)
    local = item.path.removeprefix("file://")
    if "://" in local or local.startswith("data:"):
        raise DataError(
            f"{item.path[:80]!r} is not a path: download {kind.name}s first, and name the files"
        )
    file = folder / local
    where = f"{kind.name} {file}"
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{where} cannot be read: {error}") from error
    extent = kind.measure(content, where)
    extension = file.suffix.removeprefix(".").lower()
    if not (extension.isascii() and extension.isalnum() and len(extension) <= 8):
        extension = kind.extension
    return MediaFile(item.kind, content, extension, extent)


def _quarantine(file: Path, line: Line, reason: str) -> None:
    with file.open("a") as lines:
        lines.write(
            json.dumps({"file": str(line.file), "line": line.number, "reason": reason}) + "\n"
        )

"""JSONL and image files to a dataset folder, in one pass and in constant memory.

The folder is written under a temporary name and renamed when it is complete, so a folder with its
final name is never half a dataset.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from triptych.data.dataset.dataset import Dataset, DatasetManifest
from triptych.data.parts import Encoded
from triptych.data.prepare.foreign import NOTHING, Allowed, check_inputs, check_record
from triptych.data.prepare.media_files import MediaFolders
from triptych.data.prepare.records import Line, read_lines
from triptych.data.prepare.writer import DatasetWriter, MediaFile
from triptych.data.tokenizer import Tokenizer
from triptych.data.tokens import encode_record
from triptych.errors import DataError

SHARD_SIZE = 256 << 20
"""Bytes. Small enough to copy again, large enough for a parallel file system."""
QUARANTINE = "quarantine.jsonl"
LOOK_AHEAD = 100
"""Records that are tried after a bad first one, to see whether any is good."""


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
    images: Sequence[Path],
    on_bad: OnBad = OnBad.fail,
    allowed: Allowed = NOTHING,
    shard_size: int = SHARD_SIZE,
    report: Callable[[BuildProgress], None] | None = None,
) -> DatasetManifest:
    """Writes a dataset folder from JSONL files; images are stored byte for byte.

    Args:
        inputs: JSONL files, one record of ``data.tokens.encode_record`` per line.
        output: the folder; must not exist.
        tokenizer: for the text.
        images: folders below which every image lies; relative paths start from the first.
        on_bad: ``skip`` leaves a bad sample out whole, and writes it to ``quarantine.jsonl``.
        allowed: what else would make a sample a bad one.
        shard_size: bytes after which a new shard is begun.
        report: is called after every sample.
    Raises:
        DataError: the output exists, an input is no JSONL, no sample is usable, or one is bad and
            ``on_bad`` is ``fail``; names file and line.
    """
    if output.exists():
        raise DataError(f"{output} exists already  -> remove it, or choose another --output")
    check_inputs(inputs)
    samples = _Samples(tokenizer, MediaFolders(images), allowed)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        manifest = _write(inputs, partial, samples, on_bad, shard_size, report)
        Dataset.open(partial, output.name).verify()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


class _Samples(NamedTuple):
    """How a line becomes a sample."""

    tokenizer: Tokenizer
    folders: MediaFolders
    allowed: Allowed

    def read(self, line: Line) -> tuple[Encoded, list[MediaFile]]:
        """Encodes a line and reads its media, each of which must decode."""
        record = line.parse()
        check_record(record, self.allowed)
        encoded = encode_record(record, self.tokenizer)
        return encoded, [self.folders.read(item) for item in encoded.media]

    def is_good(self, line: Line) -> bool:
        """It can be read."""
        try:
            self.read(line)
        except DataError:
            return False
        return True


def _write(
    inputs: Sequence[Path],
    folder: Path,
    samples: _Samples,
    on_bad: OnBad,
    shard_size: int,
    report: Callable[[BuildProgress], None] | None,
) -> DatasetManifest:
    started = time.monotonic()
    total_bytes = sum(path.stat().st_size for path in inputs)
    progress = BuildProgress(num_samples=0, num_skipped=0, done=0.0, elapsed_s=0.0)
    done_bytes, first_bad = 0, ""
    writer = DatasetWriter(folder, samples.tokenizer, shard_size)
    lines = read_lines(inputs)
    for line in lines:
        try:
            encoded, media = samples.read(line)
        except DataError as error:
            if on_bad is OnBad.fail:
                some_good = progress.num_samples > 0
                raise DataError(_refusal(line, error, samples, lines, some_good)) from error
            _quarantine(folder / QUARANTINE, line, str(error))
            first_bad = first_bad or f"; the first is {line.where}: {error}"
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
            f"{progress.num_skipped} bad ones{first_bad}  -> check the files given as --input"
        )
    return writer.close(progress.num_skipped)


def _refusal(
    line: Line, error: DataError, samples: _Samples, rest: Iterator[Line], some_good: bool
) -> str:
    """What is wrong; and that such samples can be left out, where there are others."""
    tried = 1
    for following in islice(rest, 0 if some_good else LOOK_AHEAD):
        tried += 1
        some_good = samples.is_good(following)
        if some_good:
            break
    told = f"{line.where}: {error}"
    has_remedy = "  -> " in told
    if some_good:
        joint = "; or" if has_remedy else "  -> mend it, or"
        return f"{told}{joint} leave such samples out: --on-bad skip"
    joint = ";" if has_remedy else "  -> mend the input:"
    return f"{told}{joint} of its first {tried} records none can be used"


def _quarantine(file: Path, line: Line, reason: str) -> None:
    with file.open("a") as lines:
        lines.write(
            json.dumps({"file": str(line.file), "line": line.number, "reason": reason}) + "\n"
        )

"""Inputs and the media they name to a dataset folder, in one pass and in constant memory.

The folder is written under a temporary name and renamed when it is complete, so a folder with its
final name is never half a dataset.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from triptych.data.dataset.dataset import Dataset, DatasetManifest
from triptych.data.parts import Encoded
from triptych.data.prepare.foreign import NOTHING, Allowed, check_record
from triptych.data.prepare.inputs.raw_sample import RawSample
from triptych.data.prepare.inputs.readers import container_of, read_inputs
from triptych.data.prepare.inputs.record_formats import convert
from triptych.data.prepare.media_files import MediaFolders
from triptych.data.prepare.spelled import special_in, with_places
from triptych.data.prepare.tally import Tally
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


class ReadingOptions(NamedTuple):
    """How records are understood."""

    allowed: Allowed = NOTHING
    """What else would make a sample a bad one."""
    format: str | None = None
    """One of ``inputs.record_formats.FORMATS``; None for what each record looks like."""
    parse_grounding: bool = False
    """Places that text spells out become parts."""
    line_end_is_target: bool = False
    """So is the line end after what the assistant says."""


AS_IT_STANDS = ReadingOptions()


@dataclass(slots=True)
class BuildProgress:
    """How far a dataset is."""

    num_samples: int
    num_skipped: int
    done: float
    """Share of the input bytes."""
    elapsed_s: float
    tally: Tally
    """Of what kinds the samples are."""


def build_dataset(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: Tokenizer,
    *,
    images: Sequence[Path],
    on_bad: OnBad = OnBad.fail,
    reading: ReadingOptions = AS_IT_STANDS,
    shard_size: int = SHARD_SIZE,
    report: Callable[[BuildProgress], None] | None = None,
) -> DatasetManifest:
    """Writes a dataset folder; media are stored byte for byte, or left in webdataset's shards.

    Args:
        inputs: files of any format of ``data.prepare.inputs``.
        output: the folder; must not exist.
        tokenizer: for the text.
        images: folders below which every image lies; relative paths start from the first.
        on_bad: ``skip`` leaves a bad sample out whole, and writes it to ``quarantine.jsonl``.
        reading: how records are understood.
        shard_size: bytes after which a new shard is begun.
        report: is called after every sample.
    Raises:
        DataError: the output exists, an input cannot be read, no sample is usable, or one is bad
            and ``on_bad`` is ``fail``; names file and number.
    """
    if output.exists():
        raise DataError(f"{output} exists already  -> remove it, or choose another --output")
    for path in inputs:
        container_of(path)
    samples = _Samples(tokenizer, MediaFolders(images), reading)
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
    """How what an input has becomes samples."""

    tokenizer: Tokenizer
    folders: MediaFolders
    reading: ReadingOptions

    def read(self, raw: RawSample, tally: Tally) -> tuple[Encoded, list[MediaFile]]:
        """Encodes a sample and reads its media, each of which must decode."""
        found, record = convert(raw.read(), self.reading.format, self.reading.allowed.keys)
        tally.formats[found] += 1
        if self.reading.parse_grounding and isinstance(record, Mapping):
            record = with_places(record)
        check_record(record, self.reading.allowed)
        encoded = encode_record(
            record, self.tokenizer, line_end_is_target=self.reading.line_end_is_target
        )
        media = [self.folders.read(item) for item in encoded.media]
        tally.good(record, encoded)
        tally.spelled.update(special_in(record))
        return encoded, media

    def is_good(self, raw: RawSample) -> bool:
        """It can be read."""
        try:
            self.read(raw, Tally())
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
    progress = BuildProgress(num_samples=0, num_skipped=0, done=0.0, elapsed_s=0.0, tally=Tally())
    done_bytes, first_bad = 0, ""
    writer = DatasetWriter(folder, samples.tokenizer, shard_size)
    raws = read_inputs(inputs)
    for raw in raws:
        try:
            encoded, media = samples.read(raw, progress.tally)
        except DataError as error:
            if on_bad is OnBad.fail:
                some_good = progress.num_samples > 0
                raise DataError(_refusal(raw, error, samples, raws, some_good)) from error
            progress.tally.bad(str(error))
            _quarantine(folder / QUARANTINE, raw, str(error))
            first_bad = first_bad or f"; the first is {raw.where}: {error}"
            progress.num_skipped += 1
        else:
            copied = any(item.place is None for item in media)
            writer.add(encoded, media, raw.shown() if copied else b"")
            progress.num_samples += 1
        done_bytes += raw.size
        progress.done = min(1.0, done_bytes / total_bytes)
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
    raw: RawSample, error: DataError, samples: _Samples, rest: Iterator[RawSample], some_good: bool
) -> str:
    """What is wrong; and that such samples can be left out, where there are others."""
    tried = 1
    for following in islice(rest, 0 if some_good else LOOK_AHEAD):
        tried += 1
        some_good = samples.is_good(following)
        if some_good:
            break
    told = f"{raw.where}: {error}"
    has_remedy = "  -> " in told
    if some_good:
        joint = "; or" if has_remedy else "  -> mend it, or"
        return f"{told}{joint} leave such samples out: --on-bad skip"
    joint = ";" if has_remedy else "  -> mend the input:"
    return f"{told}{joint} of its first {tried} records none can be used"


def _quarantine(file: Path, raw: RawSample, reason: str) -> None:
    with file.open("a") as lines:
        lines.write(
            json.dumps({"file": str(raw.file), "line": raw.number, "reason": reason}) + "\n"
        )

"""One block of an input to a dataset of its own, in one pass and in constant memory."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from triptych.data.dataset.dataset import Dataset
from triptych.data.parts import Encoded
from triptych.data.prepare.blocks import Block
from triptych.data.prepare.foreign import NOTHING, Allowed, check_record
from triptych.data.prepare.inputs.indexed_dataset import TokenisedDocument
from triptych.data.prepare.inputs.raw_sample import RawSample
from triptych.data.prepare.inputs.readers import read_segments
from triptych.data.prepare.inputs.record_formats import convert
from triptych.data.prepare.media_files import MediaFolders
from triptych.data.prepare.spelled import special_in, with_places
from triptych.data.prepare.tally import Tally
from triptych.data.prepare.writer import DatasetWriter, MediaFile
from triptych.data.tokenizer import Tokenizer
from triptych.data.tokens import encode_record
from triptych.errors import DataError

QUARANTINE = "quarantine.jsonl"
TALLY = "tally.json"
"""What a block has been counted as."""
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


Tell = Callable[[int, bool], None]


def block_folder(work: Path, number: int) -> Path:
    """Where a finished block lies."""
    return work / f"{number:06d}"


@dataclass(frozen=True, slots=True)
class BlockBuilder:
    """How what an input has becomes samples. Travels to the processes of a pool."""

    tokenizer: Tokenizer
    folders: MediaFolders
    reading: ReadingOptions
    on_bad: OnBad
    shard_size: int

    def build(self, work: Path, number: int, block: Block, tell: Tell) -> Tally:
        """Write a block as a dataset, unless it is there.

        Args:
            work: the folder of all blocks.
            number: of the block.
            block: what it is of.
            tell: is called after every sample with the bytes of its record, and whether it
                is good.

        Raises:
            DataError: a sample is bad and ``on_bad`` is ``fail``, or an input cannot be read.
        """
        folder = block_folder(work, number)
        if folder.exists():
            return Tally.of_content(json.loads((folder / TALLY).read_text()))
        partial = work / f"{folder.name}.{os.uname().nodename}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)  # of a former process of this number
        partial.mkdir()
        try:
            tally = self._write(partial, number, block, tell)
            (partial / TALLY).write_text(json.dumps(tally.content(), ensure_ascii=False))
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return tally

    def _write(self, folder: Path, number: int, block: Block, tell: Tell) -> Tally:
        tally, num_good, num_bad = Tally(), 0, 0
        prefix = f"{number}-" if number else ""
        writer = DatasetWriter(folder, self.tokenizer, self.shard_size, prefix)
        raws = read_segments(block)
        for raw in raws:
            try:
                encoded, media = self.read(raw, tally)
            except DataError as error:
                if self.on_bad is OnBad.fail:
                    raise DataError(_refusal(raw, error, self, raws, num_good > 0)) from error
                tally.bad(str(error))
                _quarantine(folder / QUARANTINE, raw, str(error))
                num_bad += 1
                is_good = False
            else:
                copied = any(item.place is None for item in media)
                writer.add(encoded, media, raw.shown() if copied else b"")
                num_good += 1
                is_good = True
            tell(raw.size, is_good)
        writer.close(num_bad)
        if num_good:
            Dataset.open(folder, folder.name).verify()
        return tally

    def read(self, raw: RawSample, tally: Tally) -> tuple[Encoded, list[MediaFile]]:
        """Encodes a sample and reads its media, each of which must decode."""
        content = raw.read()
        if isinstance(content, TokenisedDocument):
            encoded = content.encoded(self.tokenizer)
            tally.formats["IndexedDataset"] += 1
            tally.good({}, encoded)
            return encoded, []
        found, record = convert(content, self.reading.format, self.reading.allowed.keys)
        tally.formats[found] += 1
        if self.reading.parse_grounding and isinstance(record, Mapping):
            record = with_places(record)
        check_record(record, self.reading.allowed)
        encoded = encode_record(
            record, self.tokenizer, line_end_is_target=self.reading.line_end_is_target
        )
        media = self.folders.read(encoded.media)
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


def _refusal(
    raw: RawSample,
    error: DataError,
    samples: BlockBuilder,
    rest: Iterator[RawSample],
    some_good: bool,
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

"""Inputs and the media they name to a dataset folder, by any number of processes.

The folder is written under a temporary name and renamed when it is complete, so a folder with its
final name is never half a dataset. What is finished of it lies in ``.NAME.parts`` until then, and
a command that is typed again goes on from there. Any processes give the same bytes.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from triptych.data.dataset.dataset import Dataset
from triptych.data.dataset.dataset_manifest import DatasetManifest
from triptych.data.end_with_parent import end_with_parent
from triptych.data.prepare.blocks import Block, plan_blocks
from triptych.data.prepare.build_block import (
    AS_IT_STANDS,
    QUARANTINE,
    BlockBuilder,
    OnBad,
    ReadingOptions,
    block_folder,
)
from triptych.data.prepare.media_files import MediaFolders
from triptych.data.prepare.merge import merge_datasets
from triptych.data.prepare.tally import Tally
from triptych.data.tokenizer import Tokenizer
from triptych.errors import DataError

SHARD_SIZE = 256 << 20
"""Bytes. Small enough to copy again, large enough for a parallel file system."""
BLOCK_SIZE = 8 << 20
"""Bytes of input: what is done again after a kill, and what one process does at a time."""
WHOLE = (1, 1)


@dataclass(slots=True)
class BuildProgress:
    """How far a dataset is."""

    num_samples: int
    num_skipped: int
    done: float
    """Share of the input bytes."""
    elapsed_s: float
    tally: Tally
    """Of what kinds the samples are, of the blocks that are finished."""


def build_dataset(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: Tokenizer,
    *,
    images: Sequence[Path],
    on_bad: OnBad = OnBad.fail,
    reading: ReadingOptions = AS_IT_STANDS,
    shard_size: int = SHARD_SIZE,
    block_size: int = BLOCK_SIZE,
    num_processes: int = 1,
    part: tuple[int, int] = WHOLE,
    report: Callable[[BuildProgress], None] | None = None,
) -> DatasetManifest | None:
    """Writes a dataset folder; media are stored byte for byte, or left in webdataset's shards.

    Args:
        inputs: files of any format of ``data.prepare.inputs``.
        output: the folder; must not exist.
        tokenizer: for the text.
        images: folders below which every image lies; relative paths start from the first.
        on_bad: ``skip`` leaves a bad sample out whole, and writes it to ``quarantine.jsonl``.
        reading: how records are understood.
        shard_size: bytes after which a new shard is begun.
        block_size: bytes of input in a block; decides where shards end.
        num_processes: that prepare blocks at once.
        part: (i, n): only the i-th of n shares of the blocks, counted from 1, and no merging.
        report: is called after every sample, or block of one of several processes.
    Returns:
        What was written; None for a part.
    Raises:
        DataError: the output exists, an input cannot be read, no sample is usable, or one is bad
            and ``on_bad`` is ``fail``; names file and number.
    """
    if output.exists():
        raise DataError(f"{output} exists already  -> remove it, or choose another --output")
    work = output.with_name(f".{output.name}.parts")
    options = {
        "tokenizer": tokenizer.fingerprint,
        "images": [str(folder) for folder in images],
        "reading": {
            **reading._asdict(),
            "allowed": [*sorted(reading.allowed.keys), reading.allowed.spelled_media],
        },
        "shard_size": shard_size,
    }
    blocks = plan_blocks(work, inputs, options, block_size)
    builder = BlockBuilder(tokenizer, MediaFolders(images), reading, on_bad, shard_size)
    progress = _Progress(blocks, report)
    try:
        mine = range(part[0] - 1, len(blocks), part[1])
        _build_blocks(builder, work, blocks, mine, num_processes, progress)
        if part != WHOLE:
            return None
    except BaseException:
        if not any(block_folder(work, number).exists() for number in range(len(blocks))):
            shutil.rmtree(work, ignore_errors=True)
        raise
    if progress.state.num_samples:
        manifest = _merge(work, len(blocks), output)
        shutil.rmtree(work)
        return manifest
    told = _none_usable(work, inputs, progress.state.num_skipped)
    shutil.rmtree(work)
    raise DataError(told)


class _Progress:
    """Adds up what the blocks tell."""

    def __init__(
        self, blocks: Sequence[Block], report: Callable[[BuildProgress], None] | None
    ) -> None:
        self.state = BuildProgress(
            num_samples=0, num_skipped=0, done=0.0, elapsed_s=0.0, tally=Tally()
        )
        self._report = report
        self._started = time.monotonic()
        self._num_bytes = max(1, sum(segment.size for block in blocks for segment in block))
        self._done_bytes = 0

    def sample(self, size: int, is_good: bool) -> None:
        """A sample that this process has prepared."""
        self._add(size, int(is_good), int(not is_good))

    def block(self, block: Block, tally: Tally, *, counted: bool) -> None:
        """A finished block; its samples are counted already where this process made it."""
        self.state.tally.add(tally)
        if not counted:
            num_bad = sum(tally.rejects.values())
            size = sum(segment.size for segment in block)
            self._add(size, sum(tally.samples.values()), num_bad)

    def _add(self, size: int, num_good: int, num_bad: int) -> None:
        self._done_bytes += size
        self.state.num_samples += num_good
        self.state.num_skipped += num_bad
        self.state.done = min(1.0, self._done_bytes / self._num_bytes)
        self.state.elapsed_s = time.monotonic() - self._started
        if self._report is not None:
            self._report(self.state)


def _build_blocks(
    builder: BlockBuilder,
    work: Path,
    blocks: Sequence[Block],
    numbers: Sequence[int],
    num_processes: int,
    progress: _Progress,
) -> None:
    """Prepares the blocks of these numbers that are not there yet."""
    if num_processes == 1:
        for number in numbers:
            counted = not block_folder(work, number).exists()
            tally = builder.build(work, number, blocks[number], progress.sample)
            progress.block(blocks[number], tally, counted=counted)
        return
    # Spawned: a forked child may find a lock that a thread of its parent holds.
    context = get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=end_with_parent) as pool:
        futures = {
            pool.submit(builder.build, work, number, blocks[number], _tell_nobody): number
            for number in numbers
        }
        try:
            for future in as_completed(futures):
                progress.block(blocks[futures[future]], future.result(), counted=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _tell_nobody(size: int, is_good: bool) -> None:
    """In a process of a pool: the block is told of when it is finished."""


def _merge(work: Path, num_blocks: int, output: Path) -> DatasetManifest:
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        folders = [block_folder(work, number) for number in range(num_blocks)]
        manifest = merge_datasets(folders, partial)
        Dataset.open(partial, output.name)  # compares text and index with the hashes
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _none_usable(work: Path, inputs: Sequence[Path], num_skipped: int) -> str:
    first = ""
    for file in sorted(work.glob(f"*/{QUARANTINE}"))[:1]:
        bad = json.loads(file.open().readline())
        first = f"; the first is {bad['file']}:{bad['line']}: {bad['reason']}"
    return (
        f"{', '.join(map(str, inputs)) or 'no input'}: no usable sample, {num_skipped} bad ones"
        f"{first}  -> check the files given as --input"
    )

"""Packs to batches: text by index, media decoded in threads, what cannot be read reported."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from triptych.configs.model_schema import ModelConfig
from triptych.data.batch import Batch, MediaWork, Step, Unreadable, UnreadableSample
from triptych.data.loading.collate import Segment, collate
from triptych.data.loading.joined_media import JoinedMedia
from triptych.data.loading.same_thread import threads_or_none
from triptych.data.media.cache import FrameCache
from triptych.data.media.image import cut_patches
from triptych.data.media.kinds import kind_of
from triptych.data.tokens import expand
from triptych.data.types import Media, Pack, PixelLimits, SampleId, Source
from triptych.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFormat:
    """How samples become batches on this rank."""

    model: ModelConfig
    """Its special tokens, its vocabulary, and the geometry of its patches."""
    limits: PixelLimits
    pad_to: int
    """Tokens in a batch are a multiple of this: tp."""
    read_pixels: bool
    """Whether this rank reads media; the others only need to know their sizes."""
    pin_memory: bool
    """Whether batches lie in memory that a device copies from while the host goes on."""
    cache: FrameCache | None = None
    """Where decoded frames are kept; what it has is not even read from its shard."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A sample, and why its media could not all be read."""

    segment: Segment
    problems: list[tuple[Media, Unreadable, str]]
    work: MediaWork


class _UndecodableError(DataError):
    """The bytes are those that were prepared, but do not decode."""


class Reader:
    """Reads the packs of one step. Every rank gets the same batches, but for the pixels."""

    def __init__(self, sources: Sequence[Source], form: BatchFormat, *, num_workers: int) -> None:
        """Starts no thread before the first step.

        Args:
            sources: numbered as the plan numbers them.
            form: of the batches.
            num_workers: threads, 0 for that of ``read``; the result does not depend on it.
        """
        self.num_decoded = 0
        """Media decoded so far; a cache decodes some of them for us."""
        self._sources, self._form = sources, form
        self._workers = threads_or_none(num_workers, "read-media")

    def read(self, microbatches: Sequence[Sequence[Pack]]) -> Step:
        """The batches of some packs; media that cannot be read are zeros, their samples listed.

        Raises:
            DataError: a sample's text and media do not fit each other, or it has a token that the
                model does not know.
        """
        reads = deque([self._submit(packs) for packs in microbatches])
        form, batches, unreadable, work = self._form, [], [], MediaWork()
        for number, packs in enumerate(microbatches):
            samples = [future.result() for future in reads.popleft()]
            segments = [sample.segment for sample in samples]
            batch = collate(segments, form.model, pad_to=form.pad_to, with_pixels=form.read_pixels)
            self._check_length(batch, packs)
            batches.append(batch.each(Tensor.pin_memory) if form.pin_memory else batch)
            for position, sample in enumerate(samples):
                if sample.problems:
                    media, cause, _ = sample.problems[0]
                    reason = "; ".join(told for *_, told in sample.problems)
                    unreadable.append(
                        UnreadableSample(number, position, cause, media.shard, media.offset, reason)
                    )
            work += sum((sample.work for sample in samples), MediaWork())
            self.num_decoded += sum(sample.work.num_decoded for sample in samples)
        numbers = tuple(pack.number for packs in microbatches for pack in packs)
        return Step(batches, numbers, unreadable, len(self._sources), work)

    def close(self) -> None:
        """End the threads; samples not yet begun are dropped."""
        self._workers.shutdown(cancel_futures=True)

    def _submit(self, packs: Sequence[Pack]) -> list[Future[_Read]]:
        ids = [sample_id for pack in packs for sample_id in pack.samples]
        return [self._workers.submit(self._sample, sample_id) for sample_id in ids]

    def _sample(self, sample_id: SampleId) -> _Read:
        form, source = self._form, self._sources[sample_id.source]
        limits, vision = form.limits, form.model.vision
        sample = source.sample(sample_id.index)
        grids = [kind_of(media.kind).grid(media, limits, vision) for media in sample.media]
        grid_thw = np.array(grids, dtype=np.int64).reshape(-1, 3)
        input_ids, targets = expand(sample, grid_thw, form.model)
        self._check_ids(input_ids, f"{source.name}, sample {sample_id.index}")
        pixels: list[NDArray[np.uint8]] = []
        problems: list[tuple[Media, Unreadable, str]] = []
        work = MediaWork()
        files = JoinedMedia(source, sample.media)
        for number, media in enumerate(sample.media if form.read_pixels else ()):
            where = f"{source.name}, sample {sample_id.index}, {kind_of(media.kind).name} {number}"
            try:
                frames = self._frames(partial(files.read, number), media, where, work)
                pixels.append(cut_patches(frames, vision))
            except DataError as error:
                undecodable = isinstance(error, _UndecodableError)
                cause = Unreadable.undecodable if undecodable else Unreadable.damaged
                told = str(error)
                told = told if where in told else f"{where}: {told}"
                problems.append((media, cause, told))
                shape = (int(np.prod(grids[number])), vision.patch_dim)
                pixels.append(np.zeros(shape, dtype=np.uint8))
        segment = Segment(sample_id, input_ids, targets, grid_thw, tuple(pixels))
        return _Read(segment, problems, work)

    def _frames(
        self, read: Callable[[], bytes], media: Media, where: str, work: MediaWork
    ) -> NDArray[np.uint8]:
        """What is looked at of a medium, from the cache or decoded now; ``work`` counts it."""
        kind, form = kind_of(media.kind), self._form
        shape = kind.shape(media, form.limits, form.model.vision)

        def decode() -> NDArray[np.uint8]:
            data = read()
            work.num_decoded += 1
            work.read_bytes += len(data)
            started_s = time.perf_counter()
            try:
                return kind.frames(data, media, shape, where)
            except DataError as error:
                raise _UndecodableError(str(error)) from error
            finally:
                work.decode_us += round(1e6 * (time.perf_counter() - started_s))

        if form.cache is None:
            return decode()
        num_decoded = work.num_decoded
        frames = form.cache.frames(media, shape, decode)
        work.num_kept += work.num_decoded == num_decoded
        return frames

    def _check_length(self, batch: Batch, packs: Sequence[Pack]) -> None:
        """The plan counted what is there."""
        planned = sum(pack.num_tokens for pack in packs)
        if batch.num_tokens != planned:
            names = ", ".join(sorted({self._sources[i.source].name for i in batch.sample_ids}))
            raise DataError(
                f"{names}: {batch.num_tokens} tokens in packs {[pack.number for pack in packs]}, "
                f"of which the plan counted {planned}: an index, or the file of counts in sizes/, "
                "is damaged  -> launch/prepare.py verify FOLDER; if all is well, remove sizes/"
            )

    def _check_ids(self, input_ids: NDArray[np.int32], where: str) -> None:
        """No embedding would notice under tensor parallelism: each rank takes others' ids for 0."""
        largest = self._form.model.language.vocab_size - 1
        wrong = input_ids[(input_ids < 0) | (input_ids > largest)]
        if len(wrong):
            raise DataError(
                f"{where}: token {wrong[0]} is not from 0 to {largest}, "
                "model.language.vocab_size - 1  -> use the tokenizer of the model; if it is, the "
                "dataset's text.bin is damaged: prepare it again"
            )

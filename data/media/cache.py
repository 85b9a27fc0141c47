"""Decoded frames on a local disk, so that a process decodes what no other has decoded before.

    KEY.frames      xxh3-128 of the key and the frames, then the frames: (num, height, width, 3)
    KEY.partial     what becomes one; its maker holds its flock, and the others wait for it
    used            see ``cache_space.py``

The key says all that decides the pixels: content of the file, what the dataset says of it, number
and size of the frames (so fps, limits and the patches of the model), libraries, and our code. An
entry is checked whenever it is read. Nothing that is wrong with a cache stops a run: it decodes.
"""

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
import torch
import xxhash
from numpy.typing import NDArray
from PIL import features

from triptych.data.media.cache_space import CacheSpace, is_at, lock, open_or_make
from triptych.data.media.kinds import Shape
from triptych.data.types import Media

PAUSE_S = 60.0
"""How long nothing is written after a failure; entries that are there are read on."""
_DIGEST_BYTES = 16
_PIXEL_CODE = ("image.py", "video.py", "frame_choice.py", "video_file.py")
"""Files of this folder that decide on pixels."""
_CODECS = ("libjpeg_turbo", "jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif")
_log = logging.getLogger(__name__)


class FrameCache:
    """A folder of frames. Threads, processes and runs may share it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Makes the folder where it is missing.

        Args:
            folder: on a disk of this node. One that goes away during the run is not made again.
            max_bytes: on disk, of all entries together.
        """
        self._folder, self._space = folder, CacheSpace(folder, max_bytes)
        self._told: set[str] = set()
        self._paused_until_s = 0.0
        with suppress(OSError):  # the first entry says it
            folder.mkdir(parents=True, exist_ok=True)

    def frames(
        self, media: Media, shape: Shape, decode: Callable[[], NDArray[np.uint8]]
    ) -> NDArray[np.uint8]:
        """The frames of a media item, decoded once for all who ask.

        Args:
            media: whose frames.
            shape: of the frames.
            decode: makes them; what it raises is raised here, and nothing is kept.
        """
        path = self._folder / f"{key_of(media, shape)}.frames"
        if (found := self._read(path, shape)) is not None:
            return found
        with self._turn(path) as partial:
            if partial is not None and (found := self._read(path, shape)) is not None:
                return found  # whoever had the turn before has made it
            frames = decode()
            if partial is not None:
                self._write(partial, path, frames)
            return frames

    def _read(self, path: Path, shape: Shape) -> NDArray[np.uint8] | None:
        """What a whole entry holds; None where there is none."""
        try:
            with path.open("rb") as file:
                frames = np.empty(shape, dtype=np.uint8)
                digest = file.read(_DIGEST_BYTES)
                file.readinto(frames.reshape(-1).data)
                is_whole = os.fstat(file.fileno()).st_size == _DIGEST_BYTES + frames.nbytes
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._tell(error.strerror or "", f"{path}: {error.strerror}: it is decoded each time")
            return None
        if is_whole and digest == _digest(path, frames):
            return frames
        self._tell("an entry is damaged", f"{path} is damaged: it is made again")
        return None

    @contextmanager
    def _turn(self, path: Path) -> Iterator[BinaryIO | None]:
        """The partial file of an entry, which nobody else has; None where there can be none."""
        partial = None
        if time.monotonic() >= self._paused_until_s:
            try:
                partial = _hold(path.with_suffix(".partial"))
            except OSError as error:
                self._pause(error)
        try:
            yield partial
        finally:
            if partial is not None:
                with suppress(OSError):
                    if is_at(partial, partial.name):  # it has not become an entry
                        os.unlink(partial.name)
                with suppress(OSError):  # of what could not be written
                    partial.close()

    def _write(self, partial: BinaryIO, path: Path, frames: NDArray[np.uint8]) -> None:
        """Entries appear when they are whole, whoever dies; what a power cut leaves, reads show."""
        try:
            self._space.reserve(partial, _DIGEST_BYTES + frames.nbytes)
            partial.write(_digest(path, frames))
            partial.write(frames.reshape(-1).data)
            partial.flush()
            self._space.publish(partial, path)
        except OSError as error:
            self._pause(error)

    def _pause(self, error: OSError) -> None:
        self._paused_until_s = time.monotonic() + PAUSE_S
        reason = error.strerror or type(error).__name__
        self._tell(
            reason,
            f"data.cache.folder={self._folder}: {reason}; what is not there is decoded each time"
            "  -> bring it back or make room: the run goes on, and looks every minute",
        )

    def _tell(self, what: str, message: str) -> None:
        """Warn, once of each trouble in this process."""
        if what not in self._told:
            self._told.add(what)
            _log.warning("%s", message)


def key_of(media: Media, shape: Shape) -> str:
    """Which entry holds the frames: 32 hexadecimal digits."""
    measures = (media.size, media.width, media.height, media.frames)
    times = (media.start_ms, media.duration_ms)
    said = (media.kind.name, media.xxh3, measures, times, shape, _makers())
    return blake2b(repr(said).encode(), digest_size=16).hexdigest()


@cache
def _makers() -> str:
    """What turns a file into pixels: libraries, how torch computes here, and our own code."""
    import av  # late: only who caches loads ffmpeg in this process

    codecs = [features.version(name) for name in _CODECS]
    libraries = (PIL.__version__, codecs, av.__version__, av.library_versions, torch.__version__)
    computed = (platform.machine(), torch.backends.cpu.get_cpu_capability())
    code = [Path(__file__).with_name(name).read_text() for name in _PIXEL_CODE]
    return blake2b(repr((libraries, computed, code)).encode()).hexdigest()


def _digest(path: Path, frames: NDArray[np.uint8]) -> bytes:
    digest = xxhash.xxh3_128(path.stem.encode())
    digest.update(frames.reshape(-1).data)
    return digest.digest()


def _hold(path: Path) -> BinaryIO:
    """A file that this thread alone has; it is made where it is missing.

    Raises:
        OSError: it cannot be made or locked; among these ``TimeoutError``.
    """
    while True:
        file = open_or_make(path)
        try:
            lock(file)
            if is_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # it has become an entry, or made way

"""The cache of frames: the same bytes, one decode, a limit that holds, whatever ends or fails."""

import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.configs.model_schema import VisionConfig
from triptych.configs.schema import DataConfig
from triptych.data.media import cache as cache_module
from triptych.data.media import cache_space
from triptych.data.media.cache import FrameCache, key_of
from triptych.data.media.cache_space import CacheSpace
from triptych.data.media.kinds import KINDS
from triptych.data.types import Media, MediaKind, PixelLimits
from triptych.tests.helpers.runs import Runs, losses, metrics, train
from triptych.tests.helpers.videos import pictures, video

SHAPE = (2, 3, 56, 56)
ENTRY_BYTES = 20_480
"""What frames of this shape take on disk: 16 + 18,816 bytes in blocks of 4096."""
BIG = 10**9


def medium(number: int) -> Media:
    return Media(MediaKind.VIDEO, 0, 0, 1, number.to_bytes(16), 56, 56, 2, 80)


def frames_of(number: int) -> np.ndarray:
    return np.full(SHAPE, number, dtype=np.uint8) + pictures(2, 56, 56).transpose(0, 3, 1, 2)


def asked(cache: FrameCache, number: int, log: Path | None = None) -> np.ndarray:
    """Ask for frames; a decode adds a line to the log."""

    def decode() -> np.ndarray:
        if log is not None:
            with log.open("ab", buffering=0) as file:
                file.write(b"%d\n" % number)
        return frames_of(number)

    return cache.frames(medium(number), SHAPE, decode)


def never() -> np.ndarray:
    raise AssertionError("it was decoded again")


def entries(folder: Path, ending: str = "frames") -> list[Path]:
    return sorted(folder.glob(f"*.{ending}"))


def bytes_on_disk(folder: Path) -> int:
    files = [file.stat() for file in folder.iterdir() if file.name != "used"]
    return sum(512 * file.st_blocks for file in files)


def in_child(action: Callable[[], object]) -> int:
    """Fork; returns the child's pid. It ends with 0 where the action returns."""
    key_of(medium(0), SHAPE)  # so that children import nothing
    if pid := os.fork():
        return pid
    code = 1
    try:
        action()
        code = 0
    finally:
        os._exit(code)


# -- what is kept


def encoded_image() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, 200, 150)[0]).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("code", "data"), [(MediaKind.IMAGE, encoded_image()), (MediaKind.VIDEO, video(40))]
)
def test_kept_frames_are_those_that_were_decoded(code, data, tmp_path):
    kind, limits, vision = KINDS[code], PixelLimits(3136, 12_544), VisionConfig()
    media = Media(code, 0, 0, len(data), b"x" * 16, *kind.measure(data, "x"))
    shape = kind.shape(media, limits, vision)
    first = FrameCache(tmp_path, BIG).frames(
        media, shape, lambda: kind.frames(data, media, shape, "x")
    )
    kept = FrameCache(tmp_path, BIG).frames(media, shape, never)
    assert kept.dtype == np.uint8
    assert np.array_equal(kept, first)
    assert np.array_equal(kept, kind.frames(data, media, shape, "x"))


def test_all_that_decides_the_pixels_is_in_the_key(monkeypatch):
    media = medium(1)
    changes = ({"xxh3": b"y" * 16}, {"frames": 3}, {"duration_ms": 81}, {"width": 57}, {"size": 2})
    changes += ({"start_ms": 1},)
    keys = {key_of(media, SHAPE), key_of(media, (4, 3, 56, 56)), key_of(media, (2, 3, 56, 84))}
    keys |= {key_of(replace(media, **change), SHAPE) for change in changes}
    keys.add(key_of(replace(media, kind=MediaKind.IMAGE), SHAPE))
    monkeypatch.setattr(cache_module, "_makers", lambda: "another version of a library")
    keys.add(key_of(media, SHAPE))
    assert len(keys) == 3 + len(changes) + 2
    assert key_of(replace(media, shard=3, offset=512), SHAPE) in keys


@pytest.mark.parametrize("key", ["fps", "min_frames", "max_frames", "max_pixels", "max_tokens"])
def test_limits_are_in_the_key_by_what_comes_of_them(key):
    kind, vision = KINDS[MediaKind.VIDEO], VisionConfig()
    media = Media(MediaKind.VIDEO, 0, 0, 1, b"", 640, 480, 100, 4000)
    values = {"fps": 1.0, "min_frames": 20, "max_frames": 4, "max_pixels": 9 * 784}
    values["max_tokens"] = 16
    limits = PixelLimits.of(DataConfig())
    other = replace(limits, video=replace(limits.video, **{key: values[key]}))
    assert kind.shape(media, limits, vision) != kind.shape(media, other, vision)


def test_what_decoding_raises_is_raised_and_nothing_is_kept(tmp_path):
    cache = FrameCache(tmp_path, BIG)

    def fail() -> np.ndarray:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        cache.frames(medium(1), SHAPE, fail)
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(asked(cache, 1), frames_of(1))


# -- many processes


def test_eight_processes_decode_each_key_once(tmp_path):
    folder, log, numbers = tmp_path / "cache", tmp_path / "log", range(12)

    def ask_for_all(seed: int) -> None:
        cache = FrameCache(folder, BIG)
        for number in np.random.default_rng(seed % 2).permutation(numbers).tolist():
            assert np.array_equal(asked(cache, number, log), frames_of(number))

    children = [in_child(lambda seed=seed: ask_for_all(seed)) for seed in range(8)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert sorted(map(int, log.read_text().split())) == list(numbers)
    assert len(entries(folder)) == len(numbers)
    assert entries(folder, "partial") == []


def test_processes_keep_the_limit_together(tmp_path):
    """Looked at while they write; the newest of each stay."""
    limit = 10 * ENTRY_BYTES

    def fill(first: int) -> None:
        cache = FrameCache(tmp_path, limit)
        for number in range(first, first + 40):
            assert np.array_equal(asked(cache, number), frames_of(number))
            with cache._space._alone():  # nobody renames now
                assert bytes_on_disk(tmp_path) <= limit

    children = [in_child(lambda first=first: fill(first)) for first in (0, 50, 100, 150)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert 5 <= len(entries(tmp_path)) <= 10


def test_the_oldest_make_way(tmp_path):
    cache = FrameCache(tmp_path, 10 * ENTRY_BYTES)
    (tmp_path / "theirs.frames").write_bytes(bytes(10**6))
    for number in range(11):
        asked(cache, number)
        path = tmp_path / f"{key_of(medium(number), SHAPE)}.frames"
        os.utime(path, (number, number))
    for number in range(2, 11):
        cache.frames(medium(number), SHAPE, never)
    assert len(entries(tmp_path)) == 9 + 1
    assert (tmp_path / "theirs.frames").stat().st_size == 10**6


def killed(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


PHASES = {
    "has the turn": (cache_module, "is_at"),
    "decodes": (None, ""),
    "waits for room": (CacheSpace, "_alone"),
    "makes room": (CacheSpace, "_make_room"),
    "removes the oldest": (Path, "unlink"),
    "has said what it takes": (os, "posix_fallocate"),
    "has room": (cache_module, "_digest"),
    "has written": (CacheSpace, "publish"),
    "has the lock": (os, "replace"),
}


@pytest.mark.parametrize(("owner", "name"), PHASES.values(), ids=PHASES)
def test_a_killed_process_leaves_nothing_that_hurts(owner, name, tmp_path, monkeypatch):
    """Whoever comes next waits for nothing, gets the right bytes, and the limit still holds."""
    limit = 10 * ENTRY_BYTES
    cache = FrameCache(tmp_path, limit)
    for number in range(10):
        asked(cache, number)

    def die() -> None:
        if owner is not None:
            monkeypatch.setattr(owner, name, killed)
        cache.frames(medium(10), SHAPE, killed if owner is None else lambda: frames_of(10))

    _, status = os.waitpid(in_child(die), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    for number in range(10, 35):
        assert np.array_equal(asked(cache, number), frames_of(number))
        assert bytes_on_disk(tmp_path) <= limit
        cache.frames(medium(number), SHAPE, never)
    assert entries(tmp_path, "partial") == []


def test_nobody_waits_for_ever_for_a_process_that_is_stopped(tmp_path, monkeypatch, caplog):
    reading, writing = os.pipe()

    def stop() -> np.ndarray:
        os.write(writing, b"x")
        os.kill(os.getpid(), signal.SIGSTOP)
        return frames_of(1)

    child = in_child(lambda: FrameCache(tmp_path, BIG).frames(medium(1), SHAPE, stop))
    os.read(reading, 1)
    monkeypatch.setattr(cache_space, "WAIT_S", 0.05)
    cache = FrameCache(tmp_path, BIG)
    assert np.array_equal(asked(cache, 1), frames_of(1))
    assert "locked for 0.05 s" in caplog.text
    os.kill(child, signal.SIGCONT)
    assert os.waitpid(child, 0)[1] == 0
    cache.frames(medium(1), SHAPE, never)


# -- what goes wrong


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, 1000),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, 30_000),
    "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of another key": lambda path: shutil.copy(
        entries(path.parent)[path == entries(path.parent)[0]], path
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_again(damage, tmp_path, caplog):
    cache = FrameCache(tmp_path, BIG)
    asked(cache, 1), asked(cache, 2)
    damage(tmp_path / f"{key_of(medium(1), SHAPE)}.frames")
    assert np.array_equal(asked(cache, 1), frames_of(1))
    assert caplog.text.count("is damaged: it is made again") == 1
    assert np.array_equal(cache.frames(medium(1), SHAPE, never), frames_of(1))


@pytest.mark.parametrize("folder", ["/proc/triptych", "/dev/null/frames"])
def test_a_folder_that_cannot_be_written_is_said_once(folder, caplog):
    cache = FrameCache(Path(folder), BIG)
    for number in (1, 2, 1):
        assert np.array_equal(asked(cache, number), frames_of(number))
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"data.cache.folder={folder}: ")


def test_a_folder_that_goes_away_is_said_once_and_not_made_again(tmp_path, monkeypatch, caplog):
    """It may be the place of a disk that is gone; when it is back, it is used."""
    monkeypatch.setattr(cache_module, "PAUSE_S", 0.0)
    folder = tmp_path / "cache"
    cache = FrameCache(folder, BIG)
    asked(cache, 1)
    shutil.rmtree(folder)
    for number in (1, 2, 1):
        assert np.array_equal(asked(cache, number), frames_of(number))
    assert caplog.text.count("No such file or directory; what is not there is decoded each") == 1
    assert len(caplog.records) == 1
    assert not folder.exists()
    folder.mkdir()
    asked(cache, 1)
    cache.frames(medium(1), SHAPE, never)


def test_a_full_disk_is_said_once_and_what_is_there_is_read(tmp_path, monkeypatch, caplog):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "PAUSE_S", 0.0)
    cache = FrameCache(tmp_path, 10 * ENTRY_BYTES)
    asked(cache, 1)
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", no_space)
        for number in range(2, 30):
            assert np.array_equal(asked(cache, number), frames_of(number))
        cache.frames(medium(1), SHAPE, never)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    for number in range(2, 11):  # room that was promised and not taken is found again
        asked(cache, number)
    assert len(entries(tmp_path)) >= 9


def test_nothing_is_written_for_a_while_after_a_failure(tmp_path, monkeypatch):
    cache = FrameCache(tmp_path / "cache", BIG)
    shutil.rmtree(tmp_path / "cache")
    asked(cache, 1)
    (tmp_path / "cache").mkdir()
    asked(cache, 1)
    assert entries(tmp_path / "cache") == []


def test_frames_above_the_limit_are_not_kept(tmp_path, caplog):
    cache = FrameCache(tmp_path, ENTRY_BYTES - 1)
    for _ in range(2):
        assert np.array_equal(asked(cache, 1), frames_of(1))
    assert caplog.text.count("above data.cache.max_gb") == 1
    assert bytes_on_disk(tmp_path) == 0


# -- in a run


@pytest.mark.distributed
def test_a_run_with_a_cache_learns_the_same(pool, digits, tmp_path):
    """Twice: from the shards, then from the cache; and within a limit that is too small."""
    runs, folder, small = Runs(pool, digits, tmp_path), tmp_path / "cache", tmp_path / "small"

    def learned(name: str, *words: str) -> list[float]:
        # either rank may say that the other is writing what fills the limit
        runs.call(train, name, "dp2", "train.num_steps=1", "data.prefetch_steps=0", *words)
        return losses(runs.dir(name))

    def counted(name: str) -> tuple[int, int]:
        [line] = metrics(runs.dir(name))
        assert (line["decode_s"] > 0) == (line["read_bytes"] > 0) == (line["num_decoded"] > 0)
        return line["num_decoded"], line["num_kept"]

    without = learned("without")
    num_media, _ = counted("without")
    assert learned("decoded", f"data.cache.folder={folder}") == without
    kept = {path.name: path.stat().st_mtime_ns for path in entries(folder)}
    assert len(kept) > 10
    assert learned("read", f"data.cache.folder={folder}") == without
    assert {path.name: path.stat().st_mtime_ns for path in entries(folder)} == kept
    assert counted("read") == (0, num_media)
    assert sum(counted("decoded")) == sum(counted("without")) == num_media > 0
    limited = learned("limited", f"data.cache.folder={small}", "data.cache.max_gb=1e-4")
    assert limited == without
    assert 0 < bytes_on_disk(small) <= 100_000 < bytes_on_disk(folder)

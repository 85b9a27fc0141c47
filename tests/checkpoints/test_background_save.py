"""Saves beside training: told of at the commit, failing on all ranks together, killed anywhere."""

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from triptych.checkpoints.background_save import RESTS, BackgroundSave
from triptych.checkpoints.layout import CheckpointFolder, step_folders
from triptych.checkpoints.manifest import read_manifest, verify
from triptych.checkpoints.store import CheckpointStore
from triptych.data.hashed_files import HashedFile
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, SingleProcess
from triptych.tests.helpers.clock import Clock
from triptych.tests.helpers.known_place import after_changes
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.thread_ranks import ThreadRanks, on_ranks


class BytesOfStep:
    """A rank's part: 3,000 bytes that say the step; before them, whatever ``meanwhile`` does."""

    num_bytes = 3000

    def __init__(self, step: int, rank: int = 0, meanwhile: Callable[[], Any] = lambda: None):
        self._content, self._rank, self._meanwhile = bytes([step]) * 3000, rank, meanwhile

    def write(self, folder: CheckpointFolder, go_on: Callable[[], None]) -> dict[Path, HashedFile]:
        self._meanwhile()
        go_on()
        (folder.shards / f"rank_{self._rank}.bin").write_bytes(self._content)
        folder.random_state(self._rank).write_bytes(b"random")
        if self._rank == 0:
            folder.numbers.write_text("{}")
        return {}


def saves(root: Path, ranks: Ranks | None = None, keep: int = 2) -> BackgroundSave:
    ranks = ranks or SingleProcess()
    return BackgroundSave(CheckpointStore(root, ranks), ranks, keep)


def save(background: BackgroundSave, step: int, *, proven: bool = True) -> Path:
    background.begin(step, BytesOfStep(step), {})
    final = background.poll(wait=True, proven=proven)
    assert final is not None
    return final


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_save_rests_some_times_as_long_as_it_computes(tmp_path, monkeypatch):
    """Seconds of computing between two blocks; the rest ends when somebody waits for the save."""
    clock, rests = Clock(), []

    class Rest(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout)
            return super().wait(0)

    monkeypatch.setattr("triptych.checkpoints.background_save.time", clock)
    background = saves(tmp_path)
    background._is_awaited = Rest()
    part = BytesOfStep(7, meanwhile=lambda: clock.sleep(3.0))
    background.begin(7, part, {})
    assert background.poll(wait=True, proven=True) is not None
    assert rests == [3.0 * RESTS, 0.0]
    assert background._is_awaited.is_set()
    background.close()


def test_who_waits_for_a_save_ends_its_rest(tmp_path, monkeypatch):
    """Of three years."""
    clock = Clock()
    monkeypatch.setattr("triptych.checkpoints.background_save.time", clock)
    background = saves(tmp_path)
    background.begin(7, BytesOfStep(7, meanwhile=lambda: clock.sleep(1e8)), {})
    assert background.poll() is None
    assert background.poll(wait=True, proven=True) is not None
    background.close()


def test_it_is_told_when_it_is_committed_and_not_before(tmp_path):
    written = threading.Event()
    background = saves(tmp_path)
    background.begin(7, BytesOfStep(7, meanwhile=lambda: written.wait(HANG_S)), {"stage": 2})
    for _ in range(3):
        assert background.poll() is None
        assert background.step == 7
        assert names(tmp_path) == ["step_000000007.0.tmp"]
    written.set()
    final = background.poll(wait=True, proven=True)
    assert final == tmp_path / "step_000000007.0"
    assert read_manifest(final).info == {"stage": 2, "proven": True}
    assert background.step is None
    assert not verify(final, SingleProcess())
    background.close()


def test_ranks_commit_when_the_last_of_them_is_done(tmp_path):
    last = threading.Event()

    def run(ranks: ThreadRanks) -> list[Path | None]:
        background = saves(tmp_path, ranks)
        slow = (lambda: last.wait(HANG_S)) if ranks.rank == 2 else (lambda: None)
        background.begin(1, BytesOfStep(1, ranks.rank, slow), {})
        told = [background.poll() for _ in range(3)]
        last.set()
        told.append(background.poll(wait=True))
        background.close()
        return told

    final = tmp_path / "step_000000001.0"
    assert on_ranks(3, run) == [[None, None, None, final]] * 3
    assert {file.writer for file in read_manifest(final).files.values()} == {0, 1, 2}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_rank_surfaces_on_all_at_the_next_step(rank, tmp_path):
    """Also while another rank still writes."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run(ranks: ThreadRanks) -> None:
        background = saves(tmp_path, ranks)
        failed, never = threading.Event(), threading.Event()

        def write() -> None:
            if ranks.rank == rank:
                failed.set()
                raise full
            never.wait(0.2)

        try:
            background.begin(3, BytesOfStep(3, ranks.rank, write), {})
            if ranks.rank == rank:
                failed.wait(HANG_S)
            background.poll(wait=ranks.rank == rank)
        finally:
            background.close()

    errors = on_ranks(2, run)
    assert {type(error) for error in errors} == {CheckpointError}
    assert len({str(error) for error in errors}) == 1
    assert f"rank {rank}: [Errno 28] No space left on device" in str(errors[0])
    assert str(errors[0]).startswith("step 3 could not be saved in ")
    assert not step_folders(tmp_path)


def test_what_is_in_flight_is_given_up_when_the_run_ends_by_an_error(tmp_path):
    save(background := saves(tmp_path), 1)
    begun, closing = threading.Event(), threading.Event()

    def write() -> None:
        begun.set()
        closing.wait(HANG_S)

    background.begin(2, BytesOfStep(2, meanwhile=write), {})
    begun.wait(HANG_S)
    background._given_up.set()
    closing.set()
    background.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save")]
    assert names(tmp_path) == ["step_000000001.0", "step_000000002.0.tmp"]
    assert CheckpointStore(tmp_path, SingleProcess()).newest() == tmp_path / "step_000000001.0"


# --- retention, and room


def test_the_newest_that_is_proven_is_never_deleted(tmp_path):
    background = saves(tmp_path, keep=1)
    for step, proven in ((1, True), (2, True), (3, False), (4, False)):
        save(background, step, proven=proven)
    assert names(tmp_path) == ["step_000000002.0", "step_000000004.0"]
    save(background, 5, proven=True)
    assert names(tmp_path) == ["step_000000005.0"]


def test_every_nth_step_is_kept(tmp_path):
    ranks = SingleProcess()
    background = BackgroundSave(CheckpointStore(tmp_path, ranks), ranks, keep=1, keep_every=4)
    for step in range(2, 13, 2):
        save(background, step)
    assert names(tmp_path) == [f"step_{step:09d}.0" for step in (4, 8, 12)]


def test_without_room_nothing_is_written_and_it_says_what_to_delete(tmp_path, monkeypatch):
    background = saves(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(background, step)
    free = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr("triptych.checkpoints.store.shutil.disk_usage", lambda root: free)
    before = names(tmp_path)
    with pytest.raises(CheckpointError) as error:
        background.begin(4, BytesOfStep(4), {})
    assert "a checkpoint needs 1,051,576 bytes" in str(error.value)
    assert "has 1,000,000 left: nothing was written  -> make room" in str(error.value)
    lines = [line.split() for line in str(error.value).splitlines() if "rm -r" in line]
    folders = [tmp_path / f"step_00000000{step}.0" for step in (1, 2)]
    assert [Path(words[2]) for words in lines] == folders  # not the newest
    sizes = [sum(f.stat().st_size for f in each.rglob("*") if f.is_file()) for each in folders]
    assert [words[4] for words in lines] == [f"{size:,}" for size in sizes]
    assert names(tmp_path) == before
    for words in lines:
        shutil.rmtree(words[2])
    monkeypatch.undo()
    assert save(background, 4).name == "step_000000004.0"


def test_a_deletion_that_fails_fails_no_save(tmp_path, monkeypatch, caplog):
    background = saves(tmp_path, keep=1)
    save(background, 1)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("triptych.checkpoints.store.shutil.rmtree", fail)
    final = save(background, 2)
    assert f"{final} is saved; an older checkpoint could not be deleted: [Errno 5]" in caplog.text
    monkeypatch.undo()
    assert CheckpointStore(tmp_path, SingleProcess()).newest() == final
    assert names(tmp_path) == [final.name]  # what was half deleted is gone


# --- killed


def test_killed_anywhere_in_a_save_the_newest_committed_loads(tmp_path):
    """SIGKILL before each change of the file system, by whichever thread, from begin to retention.

    Each point is a process of its own that has saved steps 1 and 2 and saves step 3.
    """
    newest, num_points = set(), 0
    while (status := killed_at(num_points, root := tmp_path / str(num_points))) != 0:
        assert os.WTERMSIG(status) == signal.SIGKILL
        store = CheckpointStore(root, SingleProcess())
        found = store.newest()
        assert found is not None
        step = read_manifest(found).step
        assert (found / "shards" / "rank_0.bin").read_bytes() == bytes([step]) * 3000
        assert not verify(found, SingleProcess())
        assert not [name for name in names(root) if not name.endswith(".0")]  # no leftovers
        after = save(saves(root), 9)  # and the run goes on
        assert store.newest() == after
        newest.add(step)
        num_points += 1
    assert newest == {2, 3}
    assert num_points >= 20


def killed_at(count: int, root: Path) -> int:
    """The exit status of a process that is killed at its ``count``-th change in saving step 3."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:
        background = saves(root)
        for step in (1, 2):
            save(background, step)
        after_changes(count, lambda: os.kill(os.getpid(), signal.SIGKILL))
        save(background, 3)
        os._exit(0)
    finally:
        os._exit(1)

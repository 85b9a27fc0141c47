"""Checkpoints survive a run that dies anywhere, and files that do not stay as written."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from triptych.checkpoints.layout import COMMIT, MANIFEST, CheckpointFolder, step_folders, writer_of
from triptych.checkpoints.locate import locate
from triptych.checkpoints.manifest import read_manifest, verify
from triptych.checkpoints.store import CheckpointStore
from triptych.errors import CheckpointError
from triptych.parallel.agree import SingleProcess
from triptych.tests.helpers.thread_ranks import ThreadRanks, on_ranks

INFO = {"plan": "c0ffee", "stage": 2, "layout": {"tp": 2, "pp": 1}}


def save(store: CheckpointStore, step: int, rank: int = 0) -> Path:
    """What the ranks of a run do: begin, write, commit. The content says the step."""
    writer = store.begin(step)
    folder = writer.folder
    (folder.shards / f"rank_{rank}.bin").write_bytes(bytes([step % 256, rank]) * 500)
    folder.random_state(rank).write_bytes(b"r" * 10)
    if rank == 0:
        (folder.shards / ".metadata").write_bytes(b"m" * 40)
        folder.numbers.write_text(json.dumps({"step": step}))
    return writer.commit(INFO)


def run_with(*steps: int, root: Path) -> list[Path]:
    store = CheckpointStore(root, SingleProcess())
    return [save(store, step) for step in steps]


def newest(root: Path) -> Path | None:
    return CheckpointStore(root, SingleProcess()).newest()


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- the layout


def test_committed_folder_has_the_documented_layout(tmp_path):
    folder = run_with(12_000, root=tmp_path)[0]
    assert folder == tmp_path / "step_000012000.0"
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.attempt, manifest.info) == (12_000, 0, INFO)
    assert {name: record.size for name, record in manifest.files.items()} == {
        "data.json": 15,
        "rng/rank_00000.safetensors": 10,
        "shards/.metadata": 40,
        "shards/rank_0.bin": 1000,
    }
    assert (tmp_path / "latest").read_text() == "step_000012000.0\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000012000.0"]
    assert newest(tmp_path) == folder


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("shards/rank_3.bin", 3),
        ("rng/rank_00012.safetensors", 12),
        ("shards/.metadata", 0),
        ("a/b_7.json", 0),
    ],
)
def test_a_file_belongs_to_the_rank_in_its_name(name, rank):
    assert writer_of(name) == rank


def test_every_start_is_a_new_attempt_and_counts_as_newer(tmp_path):
    run_with(100, 200, 300, root=tmp_path)
    back = run_with(150, 200, root=tmp_path)  # a run sent back to step 100
    assert [path.name for path in back] == ["step_000000150.1", "step_000000200.1"]
    assert newest(tmp_path) == back[-1]
    assert [path.name for path in step_folders(tmp_path)][2:] == [
        "step_000000300.0",
        "step_000000200.0",
        "step_000000100.0",
    ]


def test_a_name_is_never_used_twice(tmp_path):
    store = CheckpointStore(tmp_path, SingleProcess())
    save(store, 5)
    with pytest.raises(CheckpointError, match=r"step 5 was already saved as .*step_000000005\.0"):
        store.begin(5)
    flip_bit(tmp_path / "step_000000005.0" / "data.json")
    run_with(3, root=tmp_path)
    assert newest(tmp_path).name == "step_000000003.1"
    assert run_with(5, root=tmp_path)[0].name == "step_000000005.2"


def test_an_empty_run_has_no_newest(tmp_path):
    assert newest(tmp_path / "nothing" / "here") is None


# --- retention


def test_retention_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, SingleProcess())
    for step in (1, 2, 3, 4):
        save(store, step)
    assert [path.name[:14] for path in store.retain(2)] == ["step_000000002", "step_000000001"]
    assert [path.name for path in step_folders(tmp_path)] == [
        "step_000000004.0",
        "step_000000003.0",
    ]


def test_retention_deletes_nothing_before_a_new_commit(tmp_path):
    run_with(1, 2, root=tmp_path)
    store = CheckpointStore(tmp_path, SingleProcess())
    assert store.retain(1) == []
    store.begin(3)
    assert store.retain(1) == []
    assert len(step_folders(tmp_path)) == 2


def test_retention_counts_no_abandoned_branch_as_newest(tmp_path):
    run_with(100, 200, 300, root=tmp_path)
    store = CheckpointStore(tmp_path, SingleProcess())
    kept = save(store, 120)
    store.retain(1)
    assert step_folders(tmp_path) == [kept]


# --- damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (
        lambda f: flip_bit(f / "shards/rank_0.bin"),
        r"shards/rank_0.bin has xxh3-128",
    ),
    "truncated": (
        lambda f: os.truncate(f / "shards/rank_0.bin", 999),
        "has 999 bytes, .* says 1000",
    ),
    "emptied": (
        lambda f: os.truncate(f / "rng/rank_00000.safetensors", 0),
        "rng/rank_00000.safetensors has 0 bytes",
    ),
    "one too many": (
        lambda f: shutil.copy(f / "shards/rank_0.bin", f / "shards/rank_1.bin"),
        "shards/rank_1.bin is not in MANIFEST.json",
    ),
    "missing": (lambda f: (f / "data.json").unlink(), "data.json is missing"),
    "no COMMIT": (lambda f: (f / COMMIT).unlink(), "COMMIT is missing"),
    "empty COMMIT": (lambda f: os.truncate(f / COMMIT, 0), "COMMIT says ''"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "MANIFEST.json is missing"),
    "flipped manifest": (lambda f: flip_bit(f / MANIFEST), "MANIFEST.json has xxh3-128"),
    "binary COMMIT": (lambda f: (f / COMMIT).write_bytes(b"\xff\xfe"), "COMMIT says"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_set_aside_and_passed_over(tmp_path, caplog, kind):
    harm, message = DAMAGE[kind]
    good, bad = run_with(1, 2, root=tmp_path)
    harm(bad)
    assert [bool(verify(folder, SingleProcess())) for folder in (good, bad)] == [False, True]
    assert newest(tmp_path) == good
    assert not bad.exists()
    assert (tmp_path / "step_000000002.0.damaged").is_dir()
    assert "step_000000002.0 is damaged" in caplog.text
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_named_by_a_person_is_refused(tmp_path, kind):
    harm, message = DAMAGE[kind]
    good, bad = run_with(1, 2, root=tmp_path / "checkpoints")
    harm(bad)
    for path in (tmp_path, tmp_path / "checkpoints", bad):
        with pytest.raises(CheckpointError, match=message) as error:
            locate(path, SingleProcess())
        assert f"the one before is {good}" in str(error.value)
    assert bad.exists()


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over(tmp_path):
    for folder in run_with(1, 2, root=tmp_path):
        flip_bit(folder / "data.json")
    for _ in range(2):  # the second time they already bear the name .damaged
        with pytest.raises(CheckpointError, match=r"no good checkpoint(.|\n)*step_000000001"):
            newest(tmp_path)


# --- what is not damage


@pytest.fixture
def failing(monkeypatch):
    """Let reads of files whose name ends so fail, until told otherwise."""
    open_path, ends = Path.open, {}

    def fails(self, *args, **kwargs):
        for end, number in ends.items():
            if str(self).endswith(end):
                raise OSError(number, os.strerror(number), str(self))
        return open_path(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fails)
    return ends


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("end", ["shards/rank_0.bin", MANIFEST, COMMIT])
def test_what_cannot_be_read_is_not_damaged(tmp_path, failing, end, number):
    """Every checkpoint used to be renamed, and the run to say that it has none."""
    folders = run_with(1, 2, root=tmp_path)
    failing[end] = number
    for find in (newest, lambda root: locate(root, SingleProcess())):
        with pytest.raises(CheckpointError, match="-> nothing was changed; make the") as error:
            find(tmp_path)
        assert end in str(error.value)
        assert os.strerror(number) in str(error.value)
        assert "damaged" not in str(error.value)
    failing.clear()
    assert newest(tmp_path) == folders[-1]
    assert len(step_folders(tmp_path)) == 2


def test_all_ranks_hear_of_a_file_that_one_cannot_read(tmp_path, failing):
    run_with(1, 2, root=tmp_path)
    failing["rank_0.bin"] = errno.EIO
    errors = on_ranks(3, lambda ranks: CheckpointStore(tmp_path, ranks).newest())
    assert len({str(error) for error in errors}) == 1
    assert re.search(r"rank \d: .*Input/output error", str(errors[0]))
    assert len(step_folders(tmp_path)) == 2


def test_a_half_written_folder_that_cannot_be_read_is_not_removed(tmp_path, failing):
    """It may be a whole one, that died before its renaming."""
    run_with(1, root=tmp_path)
    whole = run_with(2, root=tmp_path)[0].rename(tmp_path / "step_000000002.1.tmp")
    failing[COMMIT] = errno.EIO
    with pytest.raises(CheckpointError, match="Input/output error"):
        newest(tmp_path)
    failing.clear()
    assert whole.exists()
    assert newest(tmp_path) == tmp_path / "step_000000002.1"


def test_another_format_is_refused_by_name(tmp_path):
    folder = CheckpointFolder(run_with(1, 2, root=tmp_path)[-1])
    text = folder.manifest.read_text().replace('"format": 2', '"format": 7').encode()
    folder.manifest.write_bytes(text)
    folder.commit.write_text(xxhash.xxh3_128_hexdigest(text))
    for find in (newest, lambda root: locate(root, SingleProcess())):
        with pytest.raises(CheckpointError, match="has format 7, this version reads 2  -> use the"):
            find(tmp_path)
    assert len(step_folders(tmp_path)) == 2


def test_a_copy_under_the_name_of_another_step_is_refused(tmp_path):
    folder = run_with(14, root=tmp_path)[0]
    copy = tmp_path / "step_000000016.0"
    shutil.copytree(folder, copy)
    for find in (newest, lambda root: locate(root, SingleProcess())):
        with pytest.raises(
            CheckpointError, match=r"016\.0 holds step_000000014\.0, by its manifest"
        ):
            find(tmp_path)
    copy.rename(tmp_path / "my_copy")
    assert newest(tmp_path) == folder


def test_a_checkpoint_may_be_damaged_restored_and_damaged_again(tmp_path):
    good, bad = run_with(1, 2, root=tmp_path)
    shutil.copytree(bad, tmp_path / "backup")
    for _ in range(3):
        flip_bit(bad / "data.json")
        assert newest(tmp_path) == good
        shutil.copytree(tmp_path / "backup", bad)
    assert newest(tmp_path) == bad
    names = {path.name[16:] for path in tmp_path.glob("*.damaged*")}
    assert names == {".damaged", ".damaged_2", ".damaged_3"}
    shutil.rmtree(bad)
    flip_bit(good / "data.json")
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        newest(tmp_path)
    with pytest.raises(CheckpointError, match=r"only .*002\.0\.damaged, .*002\.0\.damaged_2"):
        locate(tmp_path, SingleProcess())


@pytest.mark.parametrize("suffix", ["", ".tmp", ".deleted", ".damaged"])
def test_a_stray_file_is_in_nobodys_way(tmp_path, suffix):
    folder = run_with(1, root=tmp_path)[0]
    for name in ("step_000000002.1", "step_000000001.0" if suffix else "step_000000007.3"):
        (tmp_path / f"{name}{suffix}").write_text("stray")
    assert newest(tmp_path) == folder
    store = CheckpointStore(tmp_path, SingleProcess())
    after = [save(store, step) for step in (2, 3)]
    store.retain(1)
    assert step_folders(tmp_path) == after[1:]
    assert newest(tmp_path) == after[1]
    assert sum(path.is_file() for path in tmp_path.glob("step_*")) == 2


# --- paths that people type


def test_locate_takes_run_folder_checkpoints_folder_and_checkpoint(tmp_path):
    older, newer = run_with(7, 8, root=tmp_path / "checkpoints")
    assert locate(tmp_path, SingleProcess()) == newer
    assert locate(tmp_path / "checkpoints", SingleProcess()) == newer
    assert locate(older, SingleProcess()) == older
    copy = older.rename(tmp_path / "my_copy")
    assert locate(copy, SingleProcess()) == copy


def test_locate_says_what_it_found_instead(tmp_path):
    run_with(7, root=tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"does not exist; beside it: step_000000007\.0"):
        locate(tmp_path / "checkpoints" / "step_000000009.0", SingleProcess())
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="found nothing in it"):
        locate(tmp_path / "other", SingleProcess())
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"neither a run folder.*found notes.txt in it"):
        locate(tmp_path / "other", SingleProcess())
    (tmp_path / "other" / "config.json").touch()
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(
        CheckpointError, match=r"Hugging Face model -> convert it with launch/convert.py"
    ):
        locate(tmp_path / "other", SingleProcess())
    (tmp_path / "step_000000007.0.damaged").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint: damaged"):
        locate(tmp_path / "step_000000007.0.damaged", SingleProcess())


# --- a run that dies


class PlantedDeathError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class Killer:
    """Ends the run just before its n-th change of the file system, of whatever kind."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.thread = threading.get_ident()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left is None or threading.get_ident() != self.thread:
            return
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if self.left == 0:
                self.left = None
                raise PlantedDeathError
            self.left -= 1


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


def deaths(
    killer: Killer, scenario: Callable[[Path], None], roots: Iterator[Path]
) -> Iterator[Path]:
    """The folder as found after dying before the 1st, 2nd, ... change, to the scenario's end."""
    for count in range(1000):
        root = next(roots)
        run_with(100, 200, root=root)
        killer.left = count
        try:
            scenario(root)
        except PlantedDeathError:
            yield root
        else:
            assert count > 15, "the scenario has that many steps at least"
            return
        finally:
            killer.left = None


def test_dying_anywhere_in_a_save_costs_at_most_that_save(tmp_path, killer):
    def scenario(root: Path) -> None:
        store = CheckpointStore(root, SingleProcess())
        save(store, 300)
        store.retain(1)

    survivors = set()
    for root in deaths(killer, scenario, (tmp_path / str(i) for i in range(1000))):
        found = newest(root)
        assert found is not None
        assert not verify(found, SingleProcess())
        survivors.add(found.name)
        assert not [
            p
            for p in root.iterdir()
            if p.name.endswith((".tmp", ".damaged", ".deleted")) and p.is_dir()
        ]
        after = run_with(400, root=root)[0]  # and the run goes on
        assert newest(root) == after
    assert survivors == {"step_000000200.0", "step_000000300.1"}


def test_dying_anywhere_in_the_recovery_is_recovered_from(tmp_path, killer):
    def scenario(root: Path) -> None:
        store = CheckpointStore(root, SingleProcess())
        (store.begin(300).folder.shards / "rank_0.bin").write_bytes(b"half")
        flip_bit(root / "step_000000200.0" / "data.json")
        newest(root)
        save(CheckpointStore(root, SingleProcess()), 300)

    for root in deaths(killer, scenario, (tmp_path / str(i) for i in range(1000))):
        found = newest(root)
        assert found is not None
        assert not verify(found, SingleProcess())


WRITER = """
import sys
from pathlib import Path
from triptych.parallel.agree import SingleProcess
from triptych.checkpoints.store import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), SingleProcess())
step = 0
while True:
    step += 1
    writer = store.begin(step)
    for part in range(3):
        (writer.folder.shards / f"rank_0_{part}.bin").write_bytes(bytes([step % 256]) * 300_000)
    writer.commit({"step": step})
    store.retain(2)
    print(step, flush=True)
"""


def test_sigkill_leaves_the_last_announced_checkpoint(tmp_path):
    for wait_s in (0.0, 0.003, 0.007, 0.02):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        announced = process.stdout.read().split()
        process.wait()
        found = newest(tmp_path)
        assert found is not None
        step = read_manifest(found).info["step"]
        assert step >= int(announced[-1] if announced else 1)
        assert (found / "shards" / "rank_0_2.bin").read_bytes() == bytes([step % 256]) * 300_000


# --- several ranks


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_write_and_find_the_same_checkpoint(tmp_path, world_size):
    def run(ranks: ThreadRanks) -> Path:
        store = CheckpointStore(tmp_path, ranks)
        for step in (1, 2, 3):
            folder = save(store, step, ranks.rank)
        store.retain(2)
        return folder

    assert on_ranks(world_size, run) == [tmp_path / "step_000000003.0"] * world_size
    assert len(step_folders(tmp_path)) == 2
    writers = {
        name: record.writer
        for name, record in read_manifest(step_folders(tmp_path)[0]).files.items()
    }
    assert writers == {name: writer_of(name) for name in writers}
    assert set(writers.values()) == set(range(world_size))

    flip_bit(tmp_path / "step_000000003.0" / "shards" / f"rank_{world_size - 1}.bin")
    resumed = on_ranks(
        3, lambda ranks: CheckpointStore(tmp_path, ranks).newest()
    )  # under another world size
    assert resumed == [tmp_path / "step_000000002.0"] * 3
    named = on_ranks(3, lambda ranks: locate(tmp_path / "step_000000002.0", ranks))
    assert named == [tmp_path / "step_000000002.0"] * 3


@pytest.mark.parametrize("rank", [0, 3, 7])
@pytest.mark.parametrize("kind", ["flipped bit", "cut", "missing", "emptied", "one too many"])
def test_one_of_eight_ranks_files_is_wrong(kind, rank, tmp_path, caplog):
    """Each is found and named, and all ranks fall back together."""

    def run(ranks: ThreadRanks) -> None:
        for step in (1, 2):
            save(CheckpointStore(tmp_path, ranks), step, ranks.rank)

    assert on_ranks(8, run) == [None] * 8
    [bad, good] = step_folders(tmp_path)
    name = f"shards/rank_{rank}.bin"
    harms = {
        "flipped bit": lambda: flip_bit(bad / name),
        "cut": lambda: os.truncate(bad / name, 999),
        "missing": (bad / name).unlink,
        "emptied": lambda: os.truncate(bad / name, 0),
        "one too many": lambda: shutil.copy(bad / name, bad / "shards" / f"rank_{rank + 8}.bin"),
    }
    harms[kind]()
    assert on_ranks(8, lambda ranks: CheckpointStore(tmp_path, ranks).newest()) == [good] * 8
    wrong = f"shards/rank_{rank + 8}.bin" if kind == "one too many" else name
    assert caplog.text.count("is damaged") == 1
    assert f"  {wrong} " in caplog.text


def test_a_hidden_file_among_a_checkpoints_is_no_damage(tmp_path):
    """As NFS leaves one where another process has a deleted file open."""
    [folder] = run_with(1, root=tmp_path)
    (folder / "shards" / ".nfs0000001").touch()
    assert newest(tmp_path) == folder


def test_a_rank_that_cannot_read_its_file_back_fails_the_commit_on_all(tmp_path):
    def run(ranks: ThreadRanks) -> None:
        store = CheckpointStore(tmp_path, ranks)
        save(store, 1, ranks.rank)
        writer = store.begin(2)
        if ranks.rank == 1:
            file = writer.folder.shards / "rank_1.bin"
            file.symlink_to("/proc/self/mem")  # reading gives EIO
        writer.commit(INFO)

    errors = on_ranks(2, run)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert "rank 1: [Errno 5] Input/output error" in str(errors[0])
    assert newest(tmp_path) == tmp_path / "step_000000001.0"


def test_a_folder_that_a_rank_does_not_see_is_refused_on_all(tmp_path):
    """Two nodes whose run.dir is each one's own disk."""
    errors = on_ranks(2, lambda ranks: CheckpointStore(tmp_path, BlindRank1(ranks)).begin(1))
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert "a file system that all nodes share" in str(errors[0])


class BlindRank1(ThreadRanks):
    """Rank 1 is told of a folder under another root."""

    def __init__(self, ranks: ThreadRanks) -> None:
        self.__dict__.update(vars(ranks))

    def all_gather(self, value: Any) -> list[Any]:
        values = super().all_gather(value)
        if self.rank == 1 and isinstance(getattr(values[0], "result", None), CheckpointFolder):
            elsewhere = CheckpointFolder(Path("/nonexistent"))
            return [values[0]._replace(result=elsewhere), *values[1:]]
        return values


GLOO_RANK = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from triptych.parallel.agree import ProcessGroupRanks
from triptych.checkpoints.store import CheckpointStore
folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group(
    "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size
)
ranks = ProcessGroupRanks()
store = CheckpointStore(folder / "checkpoints", ranks)
for step in (1, 2):
    writer = store.begin(step)
    (writer.folder.shards / f"rank_{rank}.bin").write_bytes(bytes([step, rank]) * 1000)
    saved = writer.commit({})
if rank == 0:
    os.truncate(saved / "shards" / "rank_1.bin", 7)
dist.barrier()
print(CheckpointStore(folder / "checkpoints", ranks).newest().name)
dist.destroy_process_group()
"""


def test_gloo_processes_fall_back_together(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", GLOO_RANK, str(tmp_path), str(rank), "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate() for process in ranks]
    assert [out for out, _ in outputs] == ["step_000000001.0\n"] * 2, outputs
    assert "rank_1.bin has 7 bytes" in outputs[0][1]

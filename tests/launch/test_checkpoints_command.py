"""``launch/checkpoints.py``: what a run has, whether it is good, and what may go."""

import fcntl
from pathlib import Path

import pytest

from triptych.checkpoints.layout import CHECKPOINTS, step_folders
from triptych.checkpoints.store import CheckpointStore
from triptych.errors import CheckpointError, ConfigError
from triptych.launch.checkpoints import main
from triptych.parallel.agree import SingleProcess


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run with checkpoints of steps 1 to 4; the last is not proven."""
    store = CheckpointStore(tmp_path / CHECKPOINTS, SingleProcess())
    for step in (1, 2, 3, 4):
        writer = store.begin(step)
        (writer.folder.shards / "rank_00000.bin").write_bytes(bytes([step]) * 3_000_000)
        writer.commit({"stage": "stage2", "layout": "tp=1 pp=1 dp=2", "proven": step < 4})
    return tmp_path


def test_list_tells_of_each_newest_first(run_dir, capsys):
    main(["list", str(run_dir)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"step_00000000{n}.0" for n in (4, 3, 2, 1)]
    assert [line.split("MiB")[1].split()[0] for line in lines] == ["unproven", *3 * ["proven"]]
    assert all(" 3 MiB " in line and line.endswith("stage2  tp=1 pp=1 dp=2") for line in lines)
    (run_dir / CHECKPOINTS / "step_000000002.0" / "COMMIT").unlink()
    main(["list", str(run_dir / CHECKPOINTS)])
    assert "step_000000002.0  COMMIT is missing" in capsys.readouterr().out


def test_verify_reads_all_and_changes_nothing(run_dir, capsys):
    main(["verify", str(run_dir)])
    assert capsys.readouterr().out.count("  good\n") == 4
    file = run_dir / CHECKPOINTS / "step_000000003.0" / "shards" / "rank_00000.bin"
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    with pytest.raises(CheckpointError, match=r"^step_000000003\.0 damaged  -> a run with"):
        main(["verify", str(run_dir)])
    told = capsys.readouterr().out
    assert "step_000000003.0  damaged:\n  shards/rank_00000.bin has xxh3-128 " in told
    assert told.count("  good\n") == 3
    assert len(step_folders(run_dir / CHECKPOINTS)) == 4


def test_prune_keeps_the_newest_and_the_newest_proven(run_dir, capsys):
    main(["prune", str(run_dir), "--keep", "1"])
    kept = ["step_000000004.0", "step_000000003.0"]
    assert [folder.name for folder in step_folders(run_dir / CHECKPOINTS)] == kept
    told = capsys.readouterr().out
    assert told.splitlines() == [
        "deleted step_000000002.0  3 MiB",
        "deleted step_000000001.0  3 MiB",
        f"kept {', '.join(kept)}",
    ]
    main(["prune", str(run_dir), "--keep", "1"])
    assert capsys.readouterr().out == f"kept {', '.join(kept)}\n"


def test_prune_deletes_nothing_where_the_newest_is_damaged(run_dir):
    (run_dir / CHECKPOINTS / "step_000000004.0" / "shards" / "rank_00000.bin").unlink()
    with pytest.raises(CheckpointError, match=r"is damaged:\n  shards/rank_00000.bin is missing"):
        main(["prune", str(run_dir), "--keep", "1"])
    assert len(step_folders(run_dir / CHECKPOINTS)) == 4


def test_what_cannot_be_done_is_refused(run_dir, tmp_path_factory):
    with pytest.raises(ConfigError, match=r"--keep 0 must be at least 1  -> try 1"):
        main(["prune", str(run_dir), "--keep", "0"])
    with pytest.raises(CheckpointError, match=r"has no checkpoint  -> name a run folder"):
        main(["list", str(tmp_path_factory.mktemp("empty"))])
    with (run_dir / ".lock").open("w") as lock:  # a live run's
        lock.write("process 7 on somewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="process 7 on somewhere"):
            main(["prune", str(run_dir), "--keep", "1"])
    assert len(step_folders(run_dir / CHECKPOINTS)) == 4

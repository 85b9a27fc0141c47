"""Nothing that is in a checkpoint is run, whoever made it and however well its hashes agree."""

import contextlib
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest

from triptych.checkpoints.layout import CheckpointFolder, ShardFiles
from triptych.checkpoints.manifest import read_manifest, record_files, verify, write_manifest
from triptych.configs.compose import read_config
from triptych.configs.schema import Config
from triptych.launch import convert
from triptych.launch.inference.answering import Answerer
from triptych.parallel.agree import SingleProcess
from triptych.tests.helpers.pool import RankFailureError
from triptych.tests.helpers.runs import Runs, train

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self._trace,)


def evil_shards(folder: CheckpointFolder) -> Path:
    return ShardFiles(folder.shards, 0).content


def evil_index(folder: CheckpointFolder) -> Path:
    return ShardFiles(folder.shards, 0).index


def evil_random_state(folder: CheckpointFolder) -> Path:
    return folder.random_state(0)


ATTACKS = [evil_shards, evil_index, pytest.param(evil_random_state, marks=slow)]


@pytest.fixture
def attacked(pool, digits, tmp_path) -> Callable[[Callable], tuple[Runs, Path]]:
    """A run whose checkpoint was changed so, and sealed again; and what its code would make."""

    def attack(change: Callable) -> tuple[Runs, Path]:
        runs = Runs(pool, digits, tmp_path)
        runs.train("run", "single", "train.num_steps=1")
        folder = CheckpointFolder(runs.dir("run") / "checkpoints" / "step_000000001.0")
        manifest = read_manifest(folder.path)
        change(folder).write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
        (folder.path / "COMMIT").unlink()
        (folder.path / "MANIFEST.json").unlink()
        sealed = {**asdict(manifest), "files": record_files(folder.path, rank=0, known={})}
        write_manifest(folder, type(manifest)(**sealed))
        assert verify(folder.path, SingleProcess()) == []
        return runs, tmp_path / "trace"

    return attack


@pytest.mark.parametrize("change", ATTACKS)
def test_a_pickle_in_a_checkpoint_is_never_run(change, attacked):
    runs, trace = attacked(change)
    with pytest.raises(RankFailureError, match=r"CheckpointError: .*(not saved by|ends too early)"):
        runs.train("run", "single", "train.num_steps=2")
    assert not trace.exists()


def test_nothing_of_a_checkpoint_is_unpickled(pool, digits, tmp_path):
    """By a run that resumes, one that starts from it, an export, or for an answer."""
    runs = Runs(pool, digits, tmp_path)
    runs.train("run", "single", "train.num_steps=1")
    folder = runs.dir("run")
    for file in (path for path in (folder / "checkpoints").rglob("*") if path.is_file()):
        assert file.read_bytes()[:2] not in (b"PK", *(bytes([0x80, n]) for n in range(6))), file
    tokenizer = read_config(folder / "config.yaml").data.tokenizer
    runs.call(train_unpickling_nothing, "run", "single", "train.num_steps=2")
    start = f"init.checkpoint={folder}"
    runs.call(train_unpickling_nothing, "other", "single", "train.num_steps=1", start)
    pool(1).run(export, run_dir=folder, tokenizer=tokenizer)
    pool(1).run(sample, run_dir=folder, tokenizer=tokenizer)


def unpickling_nothing() -> contextlib.ExitStack:
    """Files, that is: ranks pickle what they send each other."""
    stack = contextlib.ExitStack()
    for target in ("torch.load", "pickle.load"):
        stack.enter_context(mock.patch(target, side_effect=AssertionError(f"{target} was called")))
    return stack


def train_unpickling_nothing(config: Config) -> None:
    with unpickling_nothing():
        train(config)


def export(run_dir: Path, tokenizer: str) -> None:
    with unpickling_nothing():
        convert.main(["export", str(run_dir), f"{run_dir}_exported", "--tokenizer", tokenizer])


def sample(run_dir: Path, tokenizer: str) -> None:
    with unpickling_nothing():
        Answerer.load(run_dir, Path(tokenizer))

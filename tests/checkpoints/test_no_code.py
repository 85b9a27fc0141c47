"""Nothing that is in a checkpoint is run, whoever made it and however well its hashes agree."""

import io
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from triptych.checkpoints.layout import CheckpointFolder
from triptych.checkpoints.manifest import read_manifest, record_files, verify, write_manifest
from triptych.configs.compose import read_config
from triptych.launch import convert
from triptych.launch.inference.answering import Answerer
from triptych.parallel.agree import SingleProcess
from triptych.tests.helpers.pool import RankFailureError
from triptych.tests.helpers.runs import Runs

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow

REFUSED = r"is refused: .*; nothing in it was run  -> it was not saved by this project"


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self._trace,)


def evil_metadata(folder: CheckpointFolder, trace: Path) -> None:
    (folder.shards / ".metadata").write_bytes(pickle.dumps(Evil(trace)))


def evil_in_metadata(folder: CheckpointFolder, trace: Path) -> None:
    metadata = metadata_of(folder)
    metadata.planner_data = Evil(trace)
    (folder.shards / ".metadata").write_bytes(pickle.dumps(metadata))


def evil_value(folder: CheckpointFolder, trace: Path) -> None:
    """Torch unpickles freely what ``.metadata`` says to be bytes, not a tensor."""
    metadata = metadata_of(folder)
    index, place = next(iter(metadata.storage_data.items()))
    metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
    (folder.shards / ".metadata").write_bytes(pickle.dumps(metadata))
    file = folder.shards / place.relative_path
    content = bytearray(file.read_bytes())
    buffer = io.BytesIO()
    torch.save(Evil(trace), buffer)
    content[place.offset : place.offset + len(buffer.getvalue())] = buffer.getvalue()
    file.write_bytes(content)


def evil_common(folder: CheckpointFolder, trace: Path) -> None:
    torch.save({"args": Evil(trace)}, folder.shards / "common.pt")


def evil_random_state(folder: CheckpointFolder, trace: Path) -> None:
    torch.save({"cpu": Evil(trace)}, folder.random_state(0))


def metadata_of(folder: CheckpointFolder) -> Metadata:
    return pickle.loads((folder.shards / ".metadata").read_bytes())


ATTACKS = [
    evil_metadata,
    evil_value,
    evil_common,
    *(pytest.param(change, marks=slow) for change in (evil_in_metadata, evil_random_state)),
]


@pytest.fixture
def attacked(pool, digits, tmp_path) -> Callable[[Callable], tuple[Runs, Path]]:
    """A run whose checkpoint was changed so, and sealed again; and what its code would make."""

    def attack(change: Callable) -> tuple[Runs, Path]:
        runs = Runs(pool, digits, tmp_path)
        runs.train("run", "single", "train.num_steps=1")
        folder = CheckpointFolder(runs.dir("run") / "checkpoints" / "step_000000001.0")
        manifest = read_manifest(folder.path)
        change(folder, tmp_path / "trace")
        (folder.path / "COMMIT").unlink()
        (folder.path / "MANIFEST.json").unlink()
        sealed = {**asdict(manifest), "files": record_files(folder.path, rank=0)}
        write_manifest(folder, type(manifest)(**sealed))
        assert verify(folder.path, SingleProcess()) == []
        return runs, tmp_path / "trace"

    return attack


@pytest.mark.parametrize("change", ATTACKS)
def test_a_run_does_not_resume_from_code(change, attacked):
    runs, trace = attacked(change)
    message = runs.refusal("run", "single", "train.num_steps=2")
    assert re.match(f"CheckpointError: .*{REFUSED}", message)
    assert not trace.exists()


@pytest.mark.parametrize("change", [evil_metadata, pytest.param(evil_common, marks=slow)])
def test_nor_does_anything_else_that_loads_weights(change, attacked, pool):
    runs, trace = attacked(change)
    folder = runs.dir("run")
    tokenizer = read_config(folder / "config.yaml").data.tokenizer
    start = f"init.checkpoint={folder}"
    assert "is refused: " in runs.refusal("other", "single", "train.num_steps=2", start)
    for load in (export, sample):
        copy = shutil.copytree(folder, folder.with_name(load.__name__))
        with pytest.raises(RankFailureError, match=f"CheckpointError: .*{REFUSED}"):
            pool(1).run(load, run_dir=copy, tokenizer=tokenizer)
    assert not trace.exists()


def export(run_dir: Path, tokenizer: str) -> None:
    convert.main(["export", str(run_dir), f"{run_dir}_exported", "--tokenizer", tokenizer])


def sample(run_dir: Path, tokenizer: str) -> None:
    Answerer.load(run_dir, Path(tokenizer))

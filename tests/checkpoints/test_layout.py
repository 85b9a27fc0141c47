"""The names of a checkpoint's files stand in checkpoints/layout.py and nowhere else."""

import re
from pathlib import Path

import pytest

import triptych
from triptych.checkpoints import layout
from triptych.checkpoints.layout import (
    CheckpointFolder,
    StepName,
    parse_step,
    state_of,
    step_folders,
    step_names,
)

ROOT = Path(triptych.__file__).parent
NAMES = re.compile(
    r"""["'](shards|rng|rank_|data\.json|model\.json|environment\.json|MANIFEST\.json|COMMIT)\b"""
)
OTHERS = {
    "data/dataset/dataset.py",
    "data/prepare/merge.py",
    "data/prepare/writer.py",
    "train/failures.py",
    "train/watch/stacks.py",
}
"""A dataset folder has shards of its own; ranks that fail or hang leave files of their own."""


def test_nobody_else_writes_these_names():
    packages = ("checkpoints", "train", "launch", "models", "parallel", "data", "configs")
    found = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).glob("**/*.py")
        if NAMES.search(path.read_text())
    }
    assert found - OTHERS == {"checkpoints/layout.py"}


def test_every_file_lies_in_the_folder(tmp_path):
    folder = CheckpointFolder(tmp_path / "step_000000003.0.tmp")
    folder.make()
    files = (folder.shards, folder.numbers, folder.config, folder.model, folder.environment)
    own = (*files, folder.manifest, folder.commit, folder.random_state(0).parent)
    assert {path.parent for path in own} == {folder.path}
    assert len({path.name for path in own}) == len(own)
    assert {path.name for path in folder.path.iterdir()} == {"shards", "rng"}
    for rank in range(3):
        assert folder.num_random_states == rank
        folder.random_state(rank).touch()


@pytest.mark.parametrize(
    ("name", "state", "step"),
    [
        ("step_000000012.0", "", StepName(attempt=0, step=12)),
        ("step_1234567890.17", "", StepName(attempt=17, step=1234567890)),
        ("step_000000012.3.tmp", ".tmp", StepName(attempt=3, step=12)),
        ("step_000000012.3.damaged", ".damaged", StepName(attempt=3, step=12)),
        ("step_000000012.3.deleted", ".deleted", StepName(attempt=3, step=12)),
        ("step_000000012.3.damaged_2", ".damaged", StepName(attempt=3, step=12)),
        ("step_12", None, None),
        ("step_000000012.3.tmp.old", None, None),
        (layout.LATEST, None, None),
    ],
)
def test_a_name_says_step_attempt_and_state(name, state, step):
    assert state_of(name) == state
    if step is not None:
        assert parse_step(name) == step
        assert f"{step}{state}" == name.removesuffix("_2")


def test_folders_are_found_by_their_state_and_sorted_by_age(tmp_path):
    names = ["step_000000009.0", "step_000000002.1", "step_000000003.0.tmp", "latest", "other"]
    for name in names:
        (tmp_path / name).mkdir()
    assert [path.name for path in step_folders(tmp_path)] == ["step_000000002.1", names[0]]
    assert step_names(tmp_path, ".tmp") == ["step_000000003.0.tmp"]
    assert step_names(tmp_path / "nothing", "") == []

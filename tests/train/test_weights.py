"""Checkpoints of weights only: the same weights, to start from and to export, never to resume."""

from pathlib import Path

import pytest
import torch

from triptych.checkpoints.hf.name_table import name_table
from triptych.checkpoints.model_file import read_model
from triptych.checkpoints.run_state import WEIGHTS
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.runs import Runs, checkpoint_names, losses

OPTIONS = ("train.num_steps=4", "run.checkpoint_every=2")


@pytest.mark.distributed
def test_weights_are_kept_beside_the_checkpoints_and_are_theirs(pool, digits, tmp_path):
    runs = Runs(pool, digits, tmp_path)
    runs.train("without", "tp2", *OPTIONS)
    told = runs.train("run", "tp2", *OPTIONS, "run.weights_every=2", "run.keep=1")
    run = runs.dir("run")
    assert losses(run) == losses(runs.dir("without"))
    assert checkpoint_names(run) == ["step_000000002.0", "step_000000004.0"]  # proven, last
    kept = sorted(path for path in (run / "weights").glob("step_*"))
    assert [path.name for path in kept] == ["step_000000002.0", "step_000000004.0"]
    assert f"weights: {kept[-1]}" in told

    whole = run / "checkpoints" / "step_000000004.0"
    (same,) = pool(1).run(equal_weights, one=kept[-1], other=whole)
    assert same
    (same,) = pool(1).run(equal_weights, one=kept[0], other=kept[-1])
    assert not same
    share = size_of(kept[-1]) / size_of(whole)
    print(f"weights only: {share:.2f} of a whole checkpoint, fp32")
    assert share < 0.3

    refused = runs.refusal("run", "tp2", *OPTIONS, f"resume={kept[-1]}")
    assert "has weights only" in refused
    told = runs.train("next", "dp2", "train.num_steps=1", f"init.checkpoint={run / 'weights'}")
    assert f"weights: {kept[-1]}; optimizer state fresh" in told


def equal_weights(one: Path, other: Path) -> bool:
    """Whether both checkpoints hold the same weights, all of them."""
    model = read_model(one)
    mesh = build_mesh(1, 1, seed=0, timeout_s=HANG_S)
    loaded = []
    for folder in (one, other):
        weights = {
            name: torch.full(entry.shape, torch.nan)
            for name, entry in name_table(model).items()
            if entry.exported
        }
        stored = StoredTensors.open(folder / "shards", mesh.world)
        stored.read_whole(WEIGHTS, weights, mesh, sharding_table(model))
        loaded.append(weights)
    return all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "shards").iterdir())

"""A gated ViT in a checkpoint of tp 2 is the same model at tp 1; taken for a plain one, it is not.

All shapes agree then, so nothing else would notice.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from triptych.checkpoints.pieces import own_part
from triptych.checkpoints.run_state import WEIGHTS
from triptych.checkpoints.shard_file import Snapshot
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.models.build import build_model
from triptych.models.init import init_parameters
from triptych.models.kernels import Installed, choose
from triptych.models.parameters import global_parameters
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import ShardingTable, TensorSharding
from triptych.parallel.mesh import Mesh, build_mesh
from triptych.tests.helpers.reference import small_model

pytestmark = pytest.mark.distributed

MODEL = small_model(heads=4, kv_heads=2, tied=False, tower="gated")
RIGHT = sharding_table(MODEL)
FC1 = "vision.decoder.layers.*.mlp.linear_fc1"
AS_IF_PLAIN = replace(
    RIGHT, patterns={**RIGHT.patterns, **dict.fromkeys([f"{FC1}.weight"], TensorSharding.ROWS)}
)


def drawn(mesh: Mesh) -> dict[str, Tensor]:
    """This rank's weights."""
    tp = mesh.dims.tp
    kernels = choose(Kernels.auto, Precision.fp32, Installed.here())
    chunks = build_model(MODEL, ParallelConfig(tp=tp), Precision.fp32, [4], mesh, kernels)
    init_parameters(chunks, RIGHT, mesh, seed=0)
    return {name: parameter.detach() for name, parameter in global_parameters(chunks)}


def save(folder: Path, table: ShardingTable) -> None:
    mesh = build_mesh(2, 1, seed=0, timeout_s=60)
    snapshot = Snapshot()
    snapshot.take(own_part(WEIGHTS, drawn(mesh), mesh), mesh, table)
    snapshot.write(folder, mesh.rank)


def names_that_differ(folder: Path, table: ShardingTable) -> set[str]:
    mesh = build_mesh(1, 1, seed=0, timeout_s=60)
    want = drawn(mesh)
    got = {name: torch.full_like(weight, torch.nan) for name, weight in want.items()}
    StoredTensors.open(folder, mesh.world).read_whole(WEIGHTS, got, mesh, table)
    return {name for name in want if not torch.equal(got[name], want[name])}


def test_saved_at_tp_2_it_is_the_same_at_tp_1(pool, tmp_path):
    pool(2).run(save, folder=tmp_path, table=RIGHT)
    assert pool(1).run(names_that_differ, folder=tmp_path, table=RIGHT) == [set()]


def test_taken_for_a_plain_one_its_rows_are_mixed_up(pool, tmp_path):
    """The planted fault: what the table said of every ViT before it read the description."""
    pool(2).run(save, folder=tmp_path, table=AS_IF_PLAIN)
    mixed_up = {FC1.replace("*", str(layer)) + ".weight" for layer in range(MODEL.vision.depth)}
    assert pool(1).run(names_that_differ, folder=tmp_path, table=AS_IF_PLAIN) == [mixed_up]

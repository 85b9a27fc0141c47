"""Copies of a weight on tensor-parallel ranks: planted drift is measured, averaged, and named."""

import pytest
import torch

from triptych.models.sharding import TensorSharding
from triptych.parallel.replicas import Drift, reduce_replicas
from triptych.tests.helpers.layouts import (
    LR,
    Layout,
    LayoutCase,
    engine_of,
    make_step,
)
from triptych.tests.helpers.whole_state import whole_state
from triptych.train.engine import Engine
from triptych.train.step import train_step

pytestmark = pytest.mark.distributed

PLANTED = "merger.norm.bias"
LAYOUT = Layout(tp=2, dp=2, sequence_parallel=True)


def trained_engine(zero: str, layout: Layout) -> Engine:
    engine = engine_of(LayoutCase(layout, zero=zero))
    mesh = engine.mesh
    rates = dict.fromkeys(("vit", "adapter", "llm"), LR)
    train_step(engine, make_step("some", mesh, 1), rates)
    return engine


def tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of this rank, by name and kind."""
    engine.optimizer.gather_weights()
    found = {f"weight {name}": p.detach().clone() for name, p in engine.parameters.items()}
    for name, state in whole_state(engine).items():
        found |= {f"{kind} {name}": tensor.clone() for kind, tensor in state.items()}
    return found


def reduce(engine: Engine) -> Drift:
    replicas = {
        n: p
        for n, p in engine.parameters.items()
        if engine.sharding[n] is TensorSharding.REPLICATED
    }
    return reduce_replicas(replicas, engine.optimizer, engine.mesh)


def plant_and_reduce(zero: str, by: float) -> tuple[Drift, Drift, dict, dict]:
    """Move one tensor's weight, master and first moment on tp rank 1 by ``by`` of themselves."""
    engine = trained_engine(zero, LAYOUT)
    if engine.mesh.tp_rank == 1:
        weight = engine.parameters[PLANTED].data
        moved = weight * (1 + by)
        shard = engine.optimizer.state_shards().get(PLANTED)
        for tensor in [] if shard is None else map(shard.tensors.get, ("master", "exp_avg")):
            tensor *= 1 + by
        weight.copy_(moved)  # in fp32 a part of it is the master weight itself
    before = tensors(engine)
    drift = reduce(engine)
    return drift, reduce(engine), before, tensors(engine)


@pytest.mark.parametrize("zero", ["megatron", "megatron+all", "deepspeed"])
def test_planted_drift_is_measured_and_averaged(zero, pool):
    ranks = pool(LAYOUT.world_size).run(plant_and_reduce, zero=zero, by=1e-3)
    first, second = ranks[0][2], ranks[1][2]  # before, on tp rank 0 and 1
    for drift, again, _, after in ranks:
        assert drift.name == PLANTED
        assert drift.largest == pytest.approx(1e-3, rel=0.01)
        assert again == Drift(0.0, "")
        for name, tensor in after.items():
            if name.endswith(PLANTED) and not name.startswith("exp_avg_sq"):
                torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
                assert not torch.equal(tensor, first[name])
    for _, _, before, after in ranks:
        untouched = [name for name in before if not name.endswith(PLANTED)]
        assert all(torch.equal(before[name], after[name]) for name in untouched)


def reduce_as_trained(layout: Layout) -> Drift:
    return reduce(trained_engine("megatron", layout))


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=4), Layout(tp=2, pp=2, layers=(1, 3))], ids=str
)
def test_a_few_steps_on_a_cpu_drift_by_nothing_or_by_rounding(layout, pool):
    for drift in pool(layout.world_size).run(reduce_as_trained, layout=layout):
        print(f"{layout}: {drift}")
        assert drift.largest < 1e-5

"""CUDA paths on pretended devices: the losses of a CPU, and what the host waits for in a step."""

from dataclasses import replace

import pytest

from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.layouts import (
    LR,
    TRAINED,
    Layout,
    LayoutCase,
    config_of,
    draw_weights,
    make_step,
)
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.pretend_cuda import pretended_cuda
from triptych.train.engine import build_engine
from triptych.train.step import train_step

pytestmark = pytest.mark.distributed
NUM_PACKS = 4


def losses_and_norms(case: LayoutCase) -> list[float]:
    """Of two steps of packs with and without images."""
    layout = case.layout
    mesh = build_mesh(layout.tp, layout.pp, vpp=layout.vpp, seed=0, timeout_s=HANG_S)
    engine = build_engine(config_of(case), mesh)
    draw_weights(engine)
    step = make_step("some", mesh, case.micro_batch_size)
    step = replace(step, microbatches=step.microbatches[: NUM_PACKS // layout.dp])
    lr = {part: LR if part in TRAINED[case.stage] else 0.0 for part in ("vit", "adapter", "llm")}
    results = [train_step(engine, step, lr, number=number) for number in (1, 2)]
    return [number for result in results for number in (result.loss, result.grad_norm)]


def losses_and_norms_on_cuda(case: LayoutCase) -> list[float]:
    with pretended_cuda():
        return losses_and_norms(case)


@pytest.mark.parametrize("case", [LayoutCase(Layout()), LayoutCase(Layout(tp=2))], ids=str)
def test_losses_are_those_of_a_cpu(case, pool, pretended_pool):
    ranks = case.layout.world_size
    [on_cpu, *_] = pool(ranks).run(losses_and_norms, case=case)
    [on_cuda, *_] = pretended_pool(ranks).run(losses_and_norms_on_cuda, case=case)
    assert on_cuda == pytest.approx(on_cpu, rel=1e-6)

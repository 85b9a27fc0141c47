"""Communication that overlaps computation: packs without media must not stop the other ranks.

That every overlap computes the same: tests/parallel/test_layouts.py; here, the orders of packs
that megatron-core's counting of gradients does not survive by itself.
"""

from unittest import mock

import pytest

from triptych.models.qwen_vl.model import Qwen2VL
from triptych.tests.helpers.layouts import (
    LR,
    Layout,
    LayoutCase,
    engine_of,
    make_step,
)
from triptych.tests.helpers.pool import RankFailureError
from triptych.train.hooks.validation import validation_loss
from triptych.train.step import train_step

pytestmark = pytest.mark.distributed

ORDERS = {
    "no image in the first step": ("none", "some", "first"),
    "on one rank only, first of all": ("first", "none", "some"),
    "none in the last microbatch": ("not last", "none", "not last", "first"),
}
LAYOUTS = [
    Layout(dp=2),
    pytest.param(Layout(dp=4), marks=pytest.mark.slow),
    pytest.param(Layout(tp=2, dp=2, sequence_parallel=True), marks=pytest.mark.slow),
    pytest.param(Layout(pp=2, dp=2, layers=(1, 3)), marks=pytest.mark.slow),
    pytest.param(Layout(pp=2, dp=2, layers=(1, 1, 1, 1), vpp=2), marks=pytest.mark.slow),
]
"""The counting is done by each rank for its own buckets, whatever its chunks are: with dp 2 in
make test, with all in make test-full."""


def losses(case: LayoutCase, order: tuple[str, ...]) -> list[float]:
    """Of one step for each kind of global batch, and of a validation after each."""
    engine = engine_of(case)
    mesh = engine.mesh
    rates = dict.fromkeys(("vit", "adapter", "llm"), LR)
    found = []
    for kind in order:
        step = make_step(kind, mesh, 1)
        found.append(train_step(engine, step, rates).loss)
        found.append(validation_loss(engine.chunks, make_step("first", mesh, 1), mesh)[0])
    return found


def losses_without_blanks(case: LayoutCase, order: tuple[str, ...]) -> list[float]:
    never = mock.PropertyMock(return_value=False)
    with mock.patch.object(Qwen2VL, "runs_dummy_image", never, create=True):
        return losses(case, order)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("stage", ["stage2", pytest.param("stage1", marks=pytest.mark.slow)])
def test_packs_without_images_may_come_in_any_order(layout, stage, pool):
    for order in ORDERS.values():
        case = LayoutCase(layout, stage, zero="megatron+all")
        plain = LayoutCase(layout, stage)
        together = pool(layout.world_size).run(losses, case=case, order=order)
        apart = pool(layout.world_size).run(losses, case=plain, order=order)
        assert together[0] == pytest.approx(apart[0], rel=2e-6)


def test_without_the_blank_image_a_rank_fails(pool):
    """The fault that the blank image prevents."""
    case = LayoutCase(Layout(dp=2), zero="megatron+grads")
    with pytest.raises(RankFailureError):
        pool(2).run(losses_without_blanks, case=case, order=("some", "first"))

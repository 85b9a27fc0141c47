"""Every layout computes what one process computes: loss, gradient norm, gradients, updates.

    pytest -s tests/parallel/test_layouts.py -k "three_steps or every_pair"  # the docs' table
    pytest -s tests/parallel/test_layouts.py  # and more of the whole grid

Each case takes three global batches: images in some packs, in the first pack only, in none.
"""

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch

from triptych.models.feed import on_device
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import TensorSharding
from triptych.tests.helpers.layouts import (
    KINDS,
    LAYOUTS,
    LAYOUTS_OF_8_LAYERS,
    Layout,
    LayoutCase,
    LayoutDistance,
    LayoutOutcome,
    RankOutcome,
    distance,
    grid,
    is_for_make_test,
    join,
    measure,
    pairs,
)

pytestmark = pytest.mark.distributed

BAR = LayoutDistance(loss=2e-6, norm=2e-6, grads=2e-5, parameters=1e-2)
"""Gradients as the issue asks; parameters after three clipped steps, in learning rates."""
STEPS = 3
BF16_BAND = 3.0
"""Of a layout's distance to fp32, over that of one process in bf16; measured: 1.8 at most."""

COVER = """
tp1 pp1 dp1 stage1 untied mbs1 vit none, llm none, megatron
tp1 pp1 dp1 stage1-vit tied mbs2 vit full, llm core_attn, megatron+grads
tp1 pp1 dp1 stage3 untied mbs1 vit none, llm none, megatron+all
tp1 pp1 dp2 stage1 untied mbs1 vit none, llm core_attn+mlp, megatron
tp1 pp1 dp2 stage1-vit untied mbs1 vit none, llm mlp, deepspeed
tp1 pp1 dp2 stage2 tied mbs2 vit none, llm full, megatron+all
tp1 pp2[1,3] dp1 stage1 untied mbs2 vit none, llm core_attn, deepspeed
tp1 pp2[1,3] dp1 stage1-vit untied mbs1 vit none, llm full, megatron
tp1 pp2[1,3] dp1 stage2 untied mbs1 vit full, llm mlp, megatron+all
tp1 pp2[1,3] dp1 stage3 untied mbs1 vit none, llm core_attn+mlp, megatron
tp1 pp2[1,3] dp2 warmup tied mbs1 vit none, llm none, megatron+grads
tp1 pp2[2,2] dp1 stage1 untied mbs1 vit none, llm none, megatron
tp1 pp2[2,2] dp2 stage1 untied mbs1 vit none, llm none, megatron
tp1 pp2[3,1] dp1 stage1-vit untied mbs1 vit none, llm core_attn+mlp, megatron+grads
tp1 pp2[3,1] dp1 stage2 untied mbs1 vit none, llm none, deepspeed
tp1 pp2[3,1] dp1 stage3 untied mbs1 vit none, llm full, megatron
tp1 pp2[3,1] dp1 warmup untied mbs1 vit none, llm core_attn, megatron
tp1 pp2x2[1,1,1,1] dp1 stage1 untied mbs1 vit none, llm mlp, megatron+grads
tp1 pp2x2[1,1,1,1] dp1 stage1-vit untied mbs1 vit none, llm none, megatron+all
tp1 pp2x2[1,1,1,1] dp1 stage2 untied mbs1 vit none, llm full, megatron
tp1 pp2x2[1,1,1,1] dp1 stage3 tied mbs2 vit none, llm core_attn+mlp, deepspeed
tp1 pp2x2[1,1,1,1] dp1 warmup untied mbs1 vit none, llm none, megatron
tp1 pp2x2[1,1,1,1] dp2 stage3 untied mbs1 vit full, llm core_attn, megatron
tp1 pp3[1,1,2] dp1 stage1 untied mbs1 vit none, llm none, megatron
tp1 pp3[1,1,2] dp1 stage1-vit untied mbs1 vit none, llm core_attn, megatron+all
tp1 pp3[1,1,2] dp1 stage2 tied mbs1 vit none, llm core_attn+mlp, megatron
tp1 pp3[1,1,2] dp1 stage3 untied mbs2 vit none, llm mlp, megatron+grads
tp1 pp3[1,1,2] dp1 warmup untied mbs1 vit full, llm full, deepspeed
tp1 pp3[2,1,1] dp1 stage1 tied mbs2 vit full, llm none, megatron+all
tp1 pp4[1,1,1,1] dp1 stage1 untied mbs1 vit full, llm full, megatron+grads
tp1 pp4[1,1,1,1] dp1 stage1-vit untied mbs1 vit none, llm none, megatron+all
tp1 pp4[1,1,1,1] dp1 stage2 untied mbs1 vit none, llm core_attn, deepspeed
tp1 pp4[1,1,1,1] dp1 stage3 untied mbs1 vit none, llm core_attn+mlp, megatron
tp1 pp4[1,1,1,1] dp1 warmup tied mbs2 vit none, llm mlp, megatron
tp2 pp1 dp1 stage1 untied mbs1 vit none, llm none, megatron
tp2 pp1 dp2 stage1 untied mbs1 vit none, llm none, megatron
tp2 pp2[1,3] dp1 stage1 untied mbs1 vit none, llm none, megatron
tp2 pp2x2[1,1,1,1] dp1 stage1 untied mbs1 vit none, llm none, megatron
tp2+sp pp1 dp1 stage1-vit untied mbs1 vit none, llm none, deepspeed
tp2+sp pp1 dp1 stage2 tied mbs2 vit none, llm core_attn, megatron+grads
tp2+sp pp1 dp1 warmup untied mbs1 vit full, llm core_attn+mlp, megatron+all
tp2+sp pp1 dp2 stage3 untied mbs1 vit none, llm full, megatron
tp2+sp pp2[2,2] dp1 stage1 untied mbs1 vit none, llm none, megatron
tp2+sp pp2[3,1] dp1 stage1 untied mbs1 vit none, llm mlp, megatron
tp2+sp pp2x2[1,1,1,1] dp1 stage1 untied mbs1 vit none, llm none, megatron
tp2+sp pp2x2[1,1,1,1] dp2 stage1 untied mbs1 vit none, llm none, megatron
tp4+sp pp1 dp1 stage1-vit tied mbs2 vit full, llm core_attn, megatron+grads
"""
"""Every two choices that any case of the grid makes together, on up to 4 ranks with tp and dp of
at most 2 and on the one layout of 8 ranks that has all in one, are made together here; tensor
parallel exchange takes most of the time of a case, so few have it. And one case of tp 4."""
COVER_LEFT_TO_MAKE_TEST_FULL = """
tp1 pp1 dp4 stage1 untied mbs1 vit none, llm none, megatron
tp1 pp1 dp4 stage1-vit tied mbs2 vit full, llm core_attn, megatron+grads
tp1 pp1 dp4 stage2 untied mbs1 vit none, llm mlp, megatron+all
tp1 pp1 dp4 stage3 untied mbs1 vit none, llm core_attn+mlp, deepspeed
tp1 pp1 dp4 warmup untied mbs1 vit none, llm full, megatron
tp1 pp1 dp8 stage1 untied mbs1 vit none, llm none, megatron
tp1 pp1 dp8 stage1-vit tied mbs1 vit full, llm core_attn, megatron+grads
tp1 pp1 dp8 stage2 untied mbs1 vit none, llm mlp, megatron+all
tp1 pp1 dp8 stage3 untied mbs1 vit none, llm core_attn+mlp, deepspeed
tp1 pp1 dp8 warmup untied mbs1 vit none, llm full, megatron
tp1 pp4[1,1,1,1] dp2 stage1 untied mbs1 vit none, llm none, megatron
tp2+sp pp2[1,3] dp2 stage1 untied mbs1 vit none, llm none, megatron
tp2+sp pp4[1,1,1,1] dp1 stage1 untied mbs1 vit none, llm none, megatron
tp4 pp1 dp1 stage1 untied mbs1 vit none, llm none, megatron
tp4 pp1 dp1 stage3 untied mbs1 vit none, llm core_attn+mlp, deepspeed
tp4 pp2[1,3] dp1 stage2 untied mbs1 vit none, llm mlp, megatron+all
tp4+sp pp1 dp2 warmup untied mbs1 vit none, llm full, megatron
"""
"""Pairs of choices that take a tp or dp of 4, or 8 ranks."""

GRID = {str(case): case for layout in LAYOUTS for case in grid(layout)}
COVERING = [GRID[line] for line in COVER.strip().splitlines()]
LEFT_OVER = [GRID[line] for line in COVER_LEFT_TO_MAKE_TEST_FULL.strip().splitlines()]

Measure = Callable[..., list[LayoutOutcome]]


@pytest.fixture(scope="module")
def outcomes(pool) -> Measure:
    """``outcomes(layout, cases)``: what they give, on ranks of the pool."""

    def of(layout: Layout, cases: list[LayoutCase], **options: Any) -> list[LayoutOutcome]:
        ranks = pool(layout.world_size).run(measure, layout=layout, cases=cases, **options)
        return [join(pieces, case) for case, *pieces in zip(cases, *ranks, strict=True)]

    return of


@pytest.fixture(scope="module")
def alone(outcomes) -> Callable[[LayoutCase], LayoutOutcome]:
    """What one process gives for the same model, without recomputation, pack by pack."""
    known: dict[LayoutCase, LayoutOutcome] = {}

    def of(case: LayoutCase) -> LayoutOutcome:
        layout = Layout(layers=(sum(case.layout.layers),))
        plain = LayoutCase(
            layout, case.stage, case.tied, precision=case.precision, tower=case.tower
        )
        if plain not in known:
            known[plain] = outcomes(plain.layout, [plain], num_steps=STEPS, kinds=KINDS)[0]
        return known[plain]

    return of


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, LayoutDistance]]:
    """Worst distance by layout, printed when all is measured."""
    worst: dict[str, LayoutDistance] = {}
    yield worst
    print()
    for name, apart in worst.items():
        print(f"{name:28} {apart}")


def check(outcomes, alone, table, cases: list[LayoutCase], **options: Any) -> None:
    layout = cases[0].layout
    for case, outcome in zip(cases, outcomes(layout, cases, **options), strict=True):
        apart = distance(outcome, alone(case))
        table[str(layout)] = table.get(str(layout), apart) | apart
        assert apart.times(BAR) <= 1, f"{case}: {apart}"


IN_MAKE_TEST = {
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2, layers=(1, 3)),
    Layout(pp=3, layers=(1, 1, 2)),
    Layout(dp=2),
    Layout(dp=4),
    Layout(tp=2, pp=2, layers=(2, 2), sequence_parallel=True),
    Layout(tp=2, dp=2, sequence_parallel=True),
    Layout(pp=2, dp=2, layers=(1, 1, 1, 1), vpp=2),
    Layout(pp=4, layers=(1,) * 8, vpp=2),
}
"""Steps of the others are left to make test-full; every layout has cases in COVER."""


def left_to_make_test_full(layout: Layout) -> list[pytest.MarkDecorator]:
    return [] if layout in IN_MAKE_TEST else [pytest.mark.slow]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=left_to_make_test_full(layout), id=str(layout))
        for layout in LAYOUTS + LAYOUTS_OF_8_LAYERS
    ],
)
def test_three_steps_equal_one_process(layout, outcomes, alone, table):
    """Gradients of all parameters, and the weights after three steps of the three batches."""
    check(outcomes, alone, table, [LayoutCase(layout, tied=layout.dp == 1)], num_steps=STEPS)


def by_layout(cases: list[LayoutCase]) -> list[Any]:
    layouts = sorted({case.layout for case in cases})
    return [pytest.param([c for c in cases if c.layout == one], id=str(one)) for one in layouts]


@pytest.mark.parametrize("cases", by_layout(COVERING))
def test_every_pair_of_choices_equals_one_process(cases, outcomes, alone, table):
    check(outcomes, alone, table, cases)


@pytest.mark.slow
@pytest.mark.parametrize("cases", by_layout(LEFT_OVER))
def test_every_pair_that_takes_more_ranks_equals_one_process(cases, outcomes, alone, table):
    check(outcomes, alone, table, cases)


def test_the_covering_cases_cover_every_pair():
    in_make_test = {case for case in GRID.values() if is_for_make_test(case.layout)}
    for whole, covering in (in_make_test, COVERING), (GRID.values(), COVERING + LEFT_OVER):
        missing = set().union(*map(pairs, whole)) - set().union(*map(pairs, covering))
        assert not missing, "python -m triptych.tests.helpers.layouts prints new ones"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cases_drawn_from_the_whole_grid_equal_one_process(layout, outcomes, alone, table):
    check(outcomes, alone, table, random.Random(str(layout)).sample(grid(layout), 12))


@pytest.mark.parametrize(
    "case",
    [
        LayoutCase(Layout(tp=2), tower="gated"),
        LayoutCase(Layout(tp=2, sequence_parallel=True), zero="megatron+all", tower="windowed"),
        LayoutCase(Layout(pp=2, dp=2, layers=(1, 3)), "stage1", vit="full", tower="windowed"),
    ],
    ids=str,
)
def test_another_vit_equals_one_process(case, outcomes, alone, table):
    check(outcomes, alone, table, [case])


def slow(case: LayoutCase) -> Any:
    return pytest.param(case, marks=pytest.mark.slow)


BF16 = [
    LayoutCase(Layout(tp=2, sequence_parallel=True), zero="megatron+all"),
    slow(LayoutCase(Layout(tp=4), llm="full")),
    slow(LayoutCase(Layout(pp=2, layers=(1, 3)), tied=True)),
    slow(LayoutCase(Layout(dp=2), zero="deepspeed")),
    LayoutCase(Layout(pp=2, dp=2, layers=(1, 3)), "stage1", zero="deepspeed"),
    slow(LayoutCase(Layout(tp=2, pp=2, layers=(1, 1, 1, 1), vpp=2), zero="megatron+all")),
    slow(LayoutCase(Layout(tp=2, pp=2, dp=2, layers=(1, 3), sequence_parallel=True), "stage3")),
]


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_stays_within_the_error_of_one_bf16_process(case, outcomes, alone):
    """Its error is that of one process in bf16 against the same in fp32."""
    case = dataclasses.replace(case, precision="bf16")
    fp32 = alone(dataclasses.replace(case, precision="fp32"))
    error = distance(alone(case), fp32)
    [outcome] = outcomes(case.layout, [case], num_steps=STEPS)
    ours, apart = distance(outcome, fp32), distance(outcome, alone(case))
    print(f"{case}\n  one process, to fp32: {error}\n  to fp32: {ours}\n  to one process: {apart}")
    assert ours.times(error) <= BF16_BAND
    assert ours.times(BAR) > 100  # bf16 it is


def loss_averaged_by_microbatch():
    def averaged(loss_sum, num_supervised_tokens):
        mean = loss_sum / max(1, num_supervised_tokens)
        return mean, torch.ones((), dtype=torch.int32), loss_sum.detach()

    return mock.patch("triptych.train.step.counted", averaged)


def images_dropped_on_dp_rank_1():
    def drop(batches, mesh, place):
        if mesh.dp_rank == 1:
            without = {"pixel_values": None, "num_patches": 0}
            batches = [dataclasses.replace(batch, **without) for batch in batches]
        return on_device(batches, mesh, place)

    return mock.patch("triptych.train.step.on_device", drop)


def pixels_kept_by_the_reading_rank():
    def kept(tensor, group):
        return tensor if group.rank() == 0 else torch.zeros_like(tensor)

    return mock.patch("triptych.models.feed.broadcast_from_source", kept)


def norms_not_summed_over_tp():
    return mock.patch("triptych.models.norm.mark_shared", return_value=None)


def pieces_not_marked():
    return mock.patch("triptych.models.qwen_vl.model.mark_sharding", return_value=None)


def replicas_counted_on_every_tp_rank():
    name = "megatron.core.tensor_parallel.param_is_not_tensor_parallel_duplicate"
    return mock.patch(name, return_value=True)


def tied_embedding_not_summed():
    module = sys.modules["megatron.core.distributed.finalize_model_grads"]
    return mock.patch.object(module, "_allreduce_word_embedding_grads", return_value=None)


def nothing_clipped():
    name = "triptych.parallel.zero.megatron.clip_grad_by_total_norm_fp32"
    return mock.patch(name, return_value=None)


def gated_matrix_taken_for_a_plain_one():
    """Cut into rows, gate and up of the ViT's MLP would come to lie on different tp ranks."""
    rows = dict.fromkeys((FC1 + ".weight", FC1 + ".bias"), TensorSharding.ROWS)

    def as_if_plain(model):
        right = sharding_table(model)
        return dataclasses.replace(right, patterns={**right.patterns, **rows})

    return mock.patch("triptych.train.engine.sharding_table", as_if_plain)


FC1 = "vision.decoder.layers.*.mlp.linear_fc1"
FAULTS = [
    (loss_averaged_by_microbatch, LayoutCase(Layout())),
    (loss_averaged_by_microbatch, LayoutCase(Layout(dp=2))),
    (images_dropped_on_dp_rank_1, LayoutCase(Layout(dp=2), "stage1")),
    (pixels_kept_by_the_reading_rank, LayoutCase(Layout(tp=2))),
    (norms_not_summed_over_tp, LayoutCase(Layout(tp=2, sequence_parallel=True))),
    (pieces_not_marked, LayoutCase(Layout(tp=2))),
    (replicas_counted_on_every_tp_rank, LayoutCase(Layout(tp=2))),
    (tied_embedding_not_summed, LayoutCase(Layout(pp=2, layers=(1, 3)), tied=True)),
    (gated_matrix_taken_for_a_plain_one, LayoutCase(Layout(tp=2), tower="gated")),
    (nothing_clipped, LayoutCase(Layout(dp=2))),
]


def measure_with(
    fault: Callable[[], AbstractContextManager[object]], case: LayoutCase
) -> list[RankOutcome]:
    """All but one of the faults show in the gradients or their norm."""
    with fault():
        return measure(case.layout, [case], STEPS if fault is nothing_clipped else 0)


@pytest.mark.parametrize(
    ("fault", "case"), FAULTS, ids=[f"{fault.__name__}, {case.layout}" for fault, case in FAULTS]
)
def test_planted_fault_breaks_a_bar(fault, case, alone, pool):
    pieces = pool(case.layout.world_size).run(measure_with, fault=fault, case=case)
    apart = distance(join([piece for [piece] in pieces], case), alone(case))
    print(f"{fault.__name__:36} {apart.times(BAR):9.1e} times a bar: {apart}")
    assert apart.times(BAR) > 100

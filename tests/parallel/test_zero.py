"""Both sharded optimizers against plain torch AdamW in one process, over twenty clipped steps."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from triptych.configs.schema import OptimizerConfig, Zero
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import TensorSharding, unshard
from triptych.tests.helpers.layouts import (
    KINDS,
    LR,
    TRAINED,
    Layout,
    LayoutCase,
    config_of,
    engine_of,
    make_step,
)
from triptych.tests.helpers.whole_state import load_whole_state, whole_state
from triptych.train.engine import Engine
from triptych.train.step import count, microbatch_losses, train_step

STEPS = 20
MAX_LOSS = 5e-6
"""Relative. Worst measured: 2.5e-7."""
MAX_DRIFT = 1e-4 * LR * STEPS
"""Root mean square of a tensor's difference after all steps. Worst measured: 9.1e-8."""

LAYOUTS = [
    Layout(),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2, layers=(1, 3)),
    Layout(dp=2),
    Layout(tp=2, dp=2),
    Layout(tp=2, pp=2, layers=(2, 2)),
]


def kinds() -> Iterator[str]:
    """Global batches with images on some ranks, on one, on none, in turn."""
    return itertools.islice(itertools.cycle(KINDS), STEPS)


def rates(case: LayoutCase) -> dict[str, float]:
    return {part: LR if part in TRAINED[case.stage] else 0.0 for part in ("vit", "adapter", "llm")}


def run_sharded(
    case: LayoutCase, zeros: Sequence[Zero]
) -> tuple[list[float | None], int, dict[str, Tensor]]:
    """On every rank: losses, tp rank, this rank's parameters at the end.

    The second half of the steps is made by the second optimizer, which takes over from the first.
    """
    engine = engine_of(replace(case, zero=zeros[0].name))
    steps = {kind: make_step(kind, engine.mesh, 2) for kind in KINDS}
    losses = []
    for number, kind in enumerate(kinds()):
        if number == STEPS // 2 and zeros[1] is not zeros[0]:
            engine = taken_over(engine, case, zeros[1])
        result = train_step(engine, steps[kind], rates(case))
        losses.append(result.loss)
    parameters = {name: p.detach().clone() for name, p in engine.parameters.items()}
    return losses, engine.mesh.tp_rank, parameters


def run_fused(
    case: LayoutCase, zeros: Sequence[Zero]
) -> tuple[list[float | None], int, dict[str, Tensor]]:
    """With the AdamW that CUDA gets; torch has its kernel for CPUs, too."""
    with (
        mock.patch("triptych.parallel.zero.megatron.fuses", return_value=True),
        mock.patch("triptych.parallel.zero.deepspeed.fuses", return_value=True),
    ):
        return run_sharded(case, zeros)


def taken_over(old: Engine, case: LayoutCase, zero: Zero) -> Engine:
    """A new engine with the other optimizer, weights and optimizer state carried over."""
    state, num_updates = whole_state(old), old.optimizer.num_updates
    new = engine_of(replace(case, zero=zero.name))
    with torch.no_grad():
        for name, parameter in new.parameters.items():
            parameter.copy_(old.parameters[name])
    new.optimizer.refresh_master_weights()
    load_whole_state(new, state, num_updates)
    return new


def run_plain(case: LayoutCase) -> tuple[list[float], dict[str, Tensor], int]:
    """torch.optim.AdamW on the gradients of one process; also how many steps were clipped."""
    engine = engine_of(case)
    config: OptimizerConfig = config_of(case).optimizer
    trained = {name: p for name, p in engine.parameters.items() if p.requires_grad}
    own = {name: nn.Parameter(p.detach().clone()) for name, p in trained.items()}
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in own.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in own.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    losses, num_clipped = [], 0
    for kind in kinds():
        step = make_step(kind, engine.mesh, 2)
        engine.optimizer.zero_grad()
        total = microbatch_losses(
            engine.chunks, step.microbatches, engine.mesh, forward_only=False
        ).sum()
        losses.append(float(total) / count(step, engine.mesh).num_supervised_tokens)
        for name, grad in engine.optimizer.local_grads().items():
            own[name].grad = grad.clone()
        norm = nn.utils.clip_grad_norm_(own.values(), config.clip_grad)
        num_clipped += bool(norm > config.clip_grad)
        adam.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(own[name])
    return losses, {name: p.detach() for name, p in engine.parameters.items()}, num_clipped


def joined(ranks: list[tuple[list[float | None], int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Full tensors by name."""
    table = sharding_table(config_of(LayoutCase(Layout())).model)
    pieces: dict[str, dict[int, Tensor]] = {}
    for _, tp_rank, parameters in ranks:
        for name, tensor in parameters.items():
            pieces.setdefault(name, {})[tp_rank] = tensor
    full = {}
    for name, by_rank in pieces.items():
        sharding = table[name]
        rows = (
            [by_rank[0]]
            if sharding is TensorSharding.REPLICATED
            else [by_rank[r] for r in sorted(by_rank)]
        )
        full[name] = unshard(rows, sharding)
    return full


@pytest.fixture(scope="module")
def plain(pool):
    """By stage, computed once."""
    found: dict[str, tuple[list[float], dict[str, Tensor], int]] = {}

    def of(stage: str):
        if stage not in found:
            found[stage] = pool(1).run(run_plain, case=LayoutCase(Layout(), stage=stage))[0]
        return found[stage]

    return of


IN_MAKE_TEST = {
    *itertools.product(Zero, ["stage2"], LAYOUTS[:4]),
    (Zero.deepspeed, "stage2", Layout(tp=2, dp=2)),
    (Zero.megatron, "stage1", Layout(pp=2, layers=(1, 3))),
}
"""Each axis alone with both, a product with the one that is not megatron-core's own, and stage 1,
where the last ranks of a pipeline have nothing to train."""


def cases():
    """Both kinds in every layout in every stage."""
    for zero, stage, layout in itertools.product(Zero, ("stage2", "stage1", "stage3"), LAYOUTS):
        marks = () if (zero, stage, layout) in IN_MAKE_TEST else pytest.mark.slow
        yield pytest.param(zero, stage, layout, id=f"{zero.name}-{stage} {layout}", marks=marks)


@pytest.mark.distributed
@pytest.mark.parametrize(("zero", "stage", "layout"), cases())
def test_twenty_steps_equal_plain_adamw(pool, plain, stage, zero, layout):
    losses, _, num_clipped = plain(stage)
    assert num_clipped >= STEPS / 2, "clipping must be active"
    assert losses[18] < losses[0], "the loss must fall, on the same packs"
    case = LayoutCase(layout, stage=stage)
    compare(pool(layout.world_size).run(run_sharded, case=case, zeros=[zero] * 2), plain(stage))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2), pytest.param(Layout(pp=2, layers=(1, 3)), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("zeros", list(itertools.permutations(Zero)), ids=str)
def test_run_may_change_its_optimizer_half_way(pool, plain, zeros, layout):
    ranks = pool(layout.world_size).run(run_sharded, case=LayoutCase(layout), zeros=zeros)
    compare(ranks, plain("stage2"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "zeros",
    [
        (Zero.deepspeed, Zero.megatron),
        pytest.param((Zero.megatron, Zero.deepspeed), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_fused_adamw_too(pool, plain, zeros):
    compare(pool(2).run(run_fused, case=LayoutCase(Layout(dp=2)), zeros=zeros), plain("stage2"))


def compare(ranks, expected):
    losses, parameters, _ = expected
    worst_loss = max(abs(a - b) / b for a, b in zip(ranks[0][0], losses, strict=True))
    drifts = {
        name: float((tensor - parameters[name]).double().square().mean().sqrt())
        for name, tensor in joined(ranks).items()
        if name in parameters
    }
    worst = max(drifts, key=lambda name: drifts[name])
    print(f"loss {worst_loss:.1e}, drift {drifts[worst]:.1e} ({worst})")
    assert worst_loss <= MAX_LOSS
    assert drifts[worst] <= MAX_DRIFT

"""One wrong number on one rank: no rank updates, in any layout; the next step is as if alone."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from triptych.tests.helpers.layouts import LR, Layout, LayoutCase, engine_of, make_step
from triptych.tests.helpers.whole_state import whole_state
from triptych.train.engine import Engine
from triptych.train.step import StepResult, counted, microbatch_losses, train_step
from triptych.train.veto import Veto, VetoCause

pytestmark = pytest.mark.distributed

KINDS = ("some", "first", "none")
"""The global batches of the three steps; the second one goes wrong."""
LAYOUTS = {
    "tp2 pp2": Layout(tp=2, pp=2, layers=(1, 3)),
    "dp2 pp2": Layout(dp=2, pp=2, layers=(1, 3)),
    "dp2": Layout(dp=2),
    "tp2": Layout(tp=2, sequence_parallel=True),
    "pp2x2": Layout(pp=2, layers=(1, 1, 1, 1), vpp=2),
}
FAULTS = ("loss", "told loss", "gradient", "limit")
"""The loss of one microbatch; the same as it is told only, as after a bit flipped in it; one number
of a gradient; a limit that this rank alone sees exceeded."""
QUICK = {
    ("tp2 pp2", "megatron", "fp32", "gradient"),
    ("dp2", "deepspeed", "bf16", "loss"),
    ("dp2", "megatron+all", "bf16", "told loss"),
}
"""Every axis, optimizer and precision."""


def cases() -> Iterator[Any]:
    zeros, precisions = ("megatron", "megatron+all", "deepspeed"), ("fp32", "bf16")
    for row in itertools.product(LAYOUTS, zeros, precisions, FAULTS):
        marks = () if row in QUICK else pytest.mark.slow
        yield pytest.param(*row, id=", ".join(row), marks=marks)


@pytest.mark.parametrize(("layout", "zero", "precision", "fault"), cases())
def test_one_wrong_number_keeps_every_rank_from_updating(layout, zero, precision, fault, pool):
    case = LayoutCase(LAYOUTS[layout], zero=zero, precision=precision)
    rank = case.layout.world_size - 1
    outcomes = pool(case.layout.world_size).run(
        three_steps, case=case, fault=fault, rank=rank, timeout_s=120
    )
    for results, unchanged, same_after in outcomes:
        assert [result.veto is None for result in results] == [True, False, True]
        assert unchanged, "nothing may be updated"
        assert same_after, "the step after must be that of a run without the one that went wrong"
    vetoes = {results[1].veto for results, *_ in outcomes}
    assert len(vetoes) == 1
    check_veto(vetoes.pop(), fault, rank, case.layout)
    assert {results[1].grad_norm for results, *_ in outcomes} == {None}


def check_veto(veto: Veto, fault: str, rank: int, layout: Layout) -> None:
    """What is named: the one microbatch, or where no loss is at fault, all packs of the step."""
    assert veto.cause is (VetoCause.spike if fault == "limit" else VetoCause.not_finite)
    is_in_a_loss = fault in ("loss", "told loss")
    assert veto.ranks == ((rank,) if is_in_a_loss else ())
    first_pack_of_last_replica = 8 - 8 // layout.dp
    wanted = (first_pack_of_last_replica,) if is_in_a_loss else tuple(range(8))
    assert veto.packs == wanted
    assert (len(veto.samples) == 1 + wanted[0] % 3) or not is_in_a_loss


def three_steps(case: LayoutCase, fault: str, rank: int) -> tuple[list[StepResult], bool, bool]:
    """Results, whether the second step changed nothing, and whether the third was as without it."""
    rates = dict.fromkeys(("vit", "adapter", "llm"), LR)
    engine = engine_of(case)
    steps = [make_step(kind, engine.mesh, 1) for kind in KINDS]
    first = train_step(engine, steps[0], rates)
    before = snapshot(engine)
    is_mine = dist.get_rank() == rank
    limits = {"loss_limit": 1e-3, "vetoes_spikes": True} if fault == "limit" and is_mine else {}
    with spoilt(fault if is_mine else "none"):
        second = train_step(engine, steps[1], rates, **limits)
    unchanged = before == snapshot(engine)
    third = train_step(engine, steps[2], rates)
    after = snapshot(engine)

    other = engine_of(case)
    for number in (0, 2):
        train_step(other, steps[number], rates)
    return [first, second, third], unchanged, after == snapshot(other)


def spoilt(fault: str):
    """One number is not finite: a microbatch's loss, what is told of it, or one of a gradient."""
    calls = Counter()

    def once(name: str) -> bool:
        calls[name] += 1
        return calls[name] == 1 and fault == name

    def loss(loss_sum: torch.Tensor, num_supervised_tokens: int):
        factor = math.nan if once("loss") else 1.0
        differentiated, number, told = counted(loss_sum * factor, num_supervised_tokens)
        return differentiated, number, told * (math.nan if once("told loss") else 1.0)

    def reduce(chunks, batches, mesh, *, forward_only):
        losses = microbatch_losses(chunks, batches, mesh, forward_only=forward_only)
        if once("gradient"):
            trained = (p for chunk in chunks for p in chunk.parameters() if p.requires_grad)
            next(trained).main_grad.view(-1)[0] = math.nan
        return losses

    return mock.patch.multiple("triptych.train.step", counted=loss, microbatch_losses=reduce)


def snapshot(engine: Engine) -> dict[str, bytes]:
    """Weights, moments and counts of updates, by name."""
    engine.optimizer.gather_weights()
    weights = {n: p.detach().float().numpy().tobytes() for n, p in engine.parameters.items()}
    state = whole_state(engine)
    moments = {
        f"{name} {kind}": tensor.numpy().tobytes()
        for name, kinds in state.items()
        for kind, tensor in kinds.items()
    }
    return weights | moments | {"updates": repr(engine.optimizer.num_updates).encode()}

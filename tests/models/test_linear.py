"""Overlapped linear layers against megatron-core's, output and gradients, over real ranks.

That whole models compute the same, with all overlaps on: tests/parallel/test_layouts.py.
"""

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from triptych.models import linear
from triptych.models.linear import OverlappedColumnParallelLinear, OverlappedRowParallelLinear
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.layouts import Layout, LayoutCase, config_of
from triptych.tests.helpers.limits import HANG_S
from triptych.train.engine import build_engine

pytestmark = pytest.mark.distributed

KINDS = ("column", "row")


def outcome(layer: torch.nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Output and gradients; the output's gradient is drawn, the same for every layer."""
    inputs = inputs.detach().clone().requires_grad_(inputs.requires_grad)
    output, bias = layer(inputs)
    found = {"output": output.detach()}
    if bias is not None:
        output = output + bias
    generator = torch.Generator().manual_seed(dist.get_rank())
    output.backward(torch.randn(output.shape, generator=generator))
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    if inputs.grad is not None:
        found["input"] = inputs.grad
    layer.zero_grad(set_to_none=True)
    return found


def layers(kind: str, *, bias: bool, skip_bias_add: bool) -> list[torch.nn.Module]:
    """Megatron-core's and ours, with equal weights."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp = dist.get_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=tp,
        tensor_model_parallel_size=tp,
        sequence_parallel=True,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    common = dict(config=config, init_method=None, bias=bias, skip_bias_add=skip_bias_add)
    if kind == "column":
        pair = [
            cls(16, 24, **common) for cls in (ColumnParallelLinear, OverlappedColumnParallelLinear)
        ]
    else:
        pair = [
            cls(24, 16, input_is_parallel=True, **common)
            for cls in (RowParallelLinear, OverlappedRowParallelLinear)
        ]
    generator = torch.Generator().manual_seed(dist.get_rank())
    for theirs, ours in zip(*(layer.parameters() for layer in pair), strict=True):
        theirs.data = torch.randn(theirs.shape, generator=generator)
        ours.data = theirs.data.clone()
    return pair


def compare(kind: str, *, trains: bool, needs_input: bool) -> None:
    """Bit by bit, over biases and lengths, among them one token per rank."""
    tp = dist.get_world_size()
    build_mesh(tp, 1, seed=0, timeout_s=HANG_S)
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    for bias, skip, pieces in itertools.product((False, True), (False, True), (1, 7)):
        pair = layers(kind, bias=bias, skip_bias_add=skip)
        shape = (pieces, 1, 16) if kind == "column" else (pieces * tp, 1, 24 // tp)
        inputs = torch.randn(shape, generator=generator).requires_grad_(needs_input)
        for layer in pair:
            layer.weight.requires_grad_(trains)
            if bias:
                layer.bias.requires_grad_(trains)
        theirs, ours = (outcome(layer, inputs) for layer in pair)
        assert theirs.keys() == ours.keys()
        assert ("weight" in ours) == trains
        assert ("input" in ours) == needs_input
        for name, expected in theirs.items():
            assert torch.equal(ours[name], expected), name


def compare_fused(kind: str) -> None:
    """The branch that CUDA takes, with what torch says that its kernels compute."""
    from torch.distributed import _symmetric_memory as fused

    library = torch.library.Library("symm_mem", "IMPL", "CPU")
    library.impl("fused_all_gather_matmul", fused._fused_all_gather_matmul_fallback)
    library.impl("fused_matmul_reduce_scatter", fused._fused_matmul_reduce_scatter_fallback)
    try:
        with mock.patch.object(linear, "_has_fused_kernels", return_value=True) as asked:
            compare(kind, trains=True, needs_input=True)
            assert asked.called
    finally:
        library._destroy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_kernels_are_asked_for_the_same(pool, kind):
    pool(2).run(compare_fused, kind=kind)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("trains", "needs_input"), [(True, True), (False, True), (True, False)], ids=str
)
def test_overlapped_layers_compute_the_same(pool, tp, kind, trains, needs_input):
    pool(tp).run(compare, kind=kind, trains=trains, needs_input=needs_input)


def saved_bytes(kind: str, *, trains: bool) -> list[int]:
    """What each of the two keeps for the backward pass."""
    tp = dist.get_world_size()
    build_mesh(tp, 1, seed=0, timeout_s=HANG_S)
    shape = (7, 1, 16) if kind == "column" else (7 * tp, 1, 24 // tp)
    kept = []
    for layer in layers(kind, bias=False, skip_bias_add=False):
        layer.weight.requires_grad_(trains)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t), id):
            layer(torch.randn(shape).requires_grad_())
        kept.append(sum(tensor.nbytes for tensor in saved))
    return kept


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_they_keep_no_more_for_the_backward_pass(pool, kind, trains):
    for theirs, ours in pool(2).run(saved_bytes, kind=kind, trains=trains):
        assert ours == theirs


def kinds_of_layers(are_linked: bool) -> tuple[set[str], list[str]]:
    """Class names of the linear layers of a sequence-parallel engine, and what was said."""
    case = LayoutCase(Layout(tp=2, sequence_parallel=True), zero="megatron+all")
    mesh = build_mesh(2, 1, seed=0, timeout_s=HANG_S)
    told: list[str] = []
    with (
        mock.patch("triptych.train.engine.tp_ranks_read_each_other", return_value=are_linked),
        mock.patch("triptych.train.engine.say", told.append),
    ):
        [chunk] = build_engine(config_of(case), mesh).bare_chunks
    names = {type(module).__name__ for module in chunk.modules()}
    return {name for name in names if "ParallelLinear" in name}, told


def test_without_links_the_layers_are_megatrons_and_that_is_said(pool):
    pair = {"ColumnParallelLinear", "RowParallelLinear"}
    for kinds, told in pool(2).run(kinds_of_layers, are_linked=False):
        assert kinds == pair
        assert "tp_comm is left out" in told[0]
    for kinds, told in pool(2).run(kinds_of_layers, are_linked=True):
        assert {f"Overlapped{name}" for name in pair} <= kinds
        assert not told

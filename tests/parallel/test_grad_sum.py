"""Weight gradients summed within the matrix product, by a stand-in for apex's kernel."""

from types import SimpleNamespace
from unittest import mock

import pytest
from torch import Tensor

from triptych.models.kernels import Choice, Kernel
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.layouts import (
    LR,
    TRAINED,
    Layout,
    LayoutCase,
    engine_of,
    make_step,
)
from triptych.tests.helpers.limits import HANG_S
from triptych.train.step import train_step

pytestmark = pytest.mark.distributed

NUM_LAYERS = 4
LINEAR_LAYERS_OF_DECODER = 4
"""QKV, output, and the two of the MLP."""


def two_steps(case: LayoutCase, kernel: Kernel) -> tuple[list[float], int]:
    """Loss and norm of each, and the products that summed."""
    from megatron.core.tensor_parallel import layers

    num_products = 0

    def add_product(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        nonlocal num_products
        num_products += 1
        main_grad += grad_output.t() @ inputs

    apex = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    layout, choice = case.layout, Choice(kernel, "for the test")
    mesh = build_mesh(layout.tp, layout.pp, seed=0, timeout_s=HANG_S)
    with (
        mock.patch("triptych.train.engine.choose_grad_sum", return_value=choice),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", apex, create=True),
    ):
        engine = engine_of(case, mesh)
        step = make_step("some", mesh, 2)
        lr = {
            part: LR if part in TRAINED[case.stage] else 0.0 for part in ("vit", "adapter", "llm")
        }
        results = [train_step(engine, step, lr) for _ in (1, 2)]
    return [
        number for result in results for number in (result.loss, result.grad_norm)
    ], num_products


@pytest.mark.parametrize("zero", ["megatron", "deepspeed"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_numbers_are_those_of_torch(zero, layout, pool):
    case = LayoutCase(layout, stage="warmup", zero=zero)
    ranks = pool(layout.world_size)
    plain = ranks.run(two_steps, case=case, kernel=Kernel.TORCH)
    fused = ranks.run(two_steps, case=case, kernel=Kernel.APEX_PRODUCT)
    num_microbatches = 4 * 2  # of two packs each, in two steps
    num_products = NUM_LAYERS * LINEAR_LAYERS_OF_DECODER * num_microbatches
    for (numbers, none), (same, summed) in zip(plain, fused, strict=True):
        assert same == numbers
        assert (none, summed) == (0, num_products)

"""A deterministic run on pretended devices: what it asks of torch, cuBLAS and NCCL; its numbers."""

import os
from dataclasses import replace

import pytest
import torch

from triptych.models.kernels import Installed
from triptych.parallel.device import HAS_CUDA, be_deterministic, is_deterministic
from triptych.tests.helpers.layouts import (
    Layout,
    LayoutCase,
    engine_of,
    make_step,
)
from triptych.tests.helpers.pretend_cuda import pretended_cuda
from triptych.train.step import train_step

pytestmark = pytest.mark.distributed
ASKED = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS"}


def loss_of_a_step() -> float:
    engine = engine_of(LayoutCase(Layout(layers=(1,))))
    mesh = engine.mesh
    step = make_step("some", mesh, 1)
    step = replace(step, microbatches=step.microbatches[:1])
    return train_step(engine, step, dict.fromkeys(("vit", "adapter", "llm"), 1e-3)).loss


def with_and_without() -> tuple[float, float, dict[str, str], bool]:
    with pretended_cuda():
        assert not is_deterministic()
        plain = loss_of_a_step()
        be_deterministic()
        try:
            asked = {name: os.environ.pop(name) for name in ASKED}
            return plain, loss_of_a_step(), asked, Installed.here().deterministic
        finally:
            torch.use_deterministic_algorithms(False)


def test_a_deterministic_step_gives_the_same_loss(pretended_pool):
    [(plain, deterministic, asked, chosen_by)] = pretended_pool(1).run(with_and_without)
    assert deterministic == pytest.approx(plain, rel=1e-6)
    assert asked == ASKED
    assert chosen_by


@pytest.mark.skipif(HAS_CUDA, reason="a GPU does")
def test_a_cpu_needs_nothing():
    be_deterministic()
    assert not is_deterministic()

"""Activations that keep only their input; which kernels are chosen from what is installed."""

import dataclasses
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from triptych.configs.schema import Kernels, Precision, Zero
from triptych.data.partition import Partition
from triptych.models.activations import SwiGLU, quick_gelu
from triptych.models.attention import VARLEN_ATTENTIONS, Segments
from triptych.models.kernels import (
    NO_COMPILER,
    PACKAGES,
    VARLEN,
    Installed,
    Kernel,
    choose,
    choose_adam,
)

BAR = 5e-7
"""Largest difference / largest element, against fp64; measured: 2.4e-7 at most."""


def swiglu_by_torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS = {
    "SwiGLU": (SwiGLU(None), swiglu_by_torch),
    "quick GELU": (quick_gelu(), lambda x: x * torch.sigmoid(1.702 * x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_torch_and_keeps_its_input_only(name):
    ours, by_torch = ACTIVATIONS[name]
    x = (3 * torch.randn(50, 1, 64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    exact = x.detach().double().requires_grad_()
    want = by_torch(exact)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    want.backward(upstream.double())
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        got = ours(x)
    got.backward(upstream)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    for one, other in ((got.detach(), want.detach()), (x.grad, exact.grad)):
        assert float((one - other).abs().max()) <= BAR * float(other.abs().max())


EVERYTHING = Installed(True, frozenset([*PACKAGES, VARLEN]), compiles=True)
CUDA_ONLY = Installed(True, frozenset([VARLEN]), compiles=True)
ON_CPU = Installed(False, EVERYTHING.modules, compiles=True)


def chosen(kernels: Kernels, installed: Installed, precision=Precision.bf16) -> dict[str, Kernel]:
    table = choose(kernels, precision, installed)
    return {name: choice.kernel for name, choice in table.rows()}


def test_fused_kernels_are_taken_where_they_are_installed():
    assert chosen(Kernels.auto, EVERYTHING) == {
        "attention": Kernel.FLASH_ATTENTION,
        "rms_norm": Kernel.LIGER,
        "layer_norm": Kernel.TORCH,
        "activation": Kernel.COMPILED,
        "rotary": Kernel.TRANSFORMER_ENGINE,
        "loss": Kernel.CHUNKED,
    }


@pytest.mark.parametrize(
    ("kernels", "installed", "attention", "reason"),
    [
        (Kernels.torch, EVERYTHING, Kernel.TORCH_VARLEN, "train.kernels=torch"),
        (Kernels.auto, ON_CPU, Kernel.PER_SEGMENT, "no CUDA"),
        (Kernels.torch, ON_CPU, Kernel.PER_SEGMENT, "no CUDA"),
        (Kernels.auto, CUDA_ONLY, Kernel.TORCH_VARLEN, "flash-attn is not installed"),
        (
            Kernels.auto,
            Installed(True, frozenset(), compiles=True),
            Kernel.PER_SEGMENT,
            "flash-attn is not installed, and this torch has no varlen_attn",
        ),
    ],
)
def test_torch_serves_where_they_are_not(kernels, installed, attention, reason):
    table = choose(kernels, Precision.bf16, installed)
    assert table.attention == (attention, reason)
    assert table.attention.kernel in VARLEN_ATTENTIONS
    assert table.rms_norm.kernel is table.rotary.kernel is Kernel.TORCH
    compiles = installed.cuda and kernels is Kernels.auto
    assert table.activation.kernel is (Kernel.COMPILED if compiles else Kernel.TORCH)
    assert table.rms_norm.reason in (reason, "liger-kernel is not installed")


def test_flash_attention_3_is_for_hopper():
    on_hopper = dataclasses.replace(EVERYTHING, hopper=True)
    assert chosen(Kernels.auto, on_hopper)["attention"] is Kernel.FLASH_ATTENTION_3
    assert chosen(Kernels.torch, on_hopper)["attention"] is Kernel.TORCH_VARLEN


def test_kernels_that_give_the_same_bits_each_time():
    table = choose(
        Kernels.auto, Precision.bf16, dataclasses.replace(EVERYTHING, deterministic=True)
    )
    assert table.attention == (Kernel.FLASH_ATTENTION, "installed; its deterministic backward")
    assert table.rms_norm == (Kernel.TORCH, "train.deterministic=true")


@pytest.mark.parametrize("result", [lambda q: q, lambda q: (q, None)], ids=["newer", "first"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_3_is_asked_for_what_the_run_wants(result, deterministic, monkeypatch):
    asked = {}
    function = lambda q, *_, **options: asked.update(options) or result(q)  # noqa: E731
    fake = SimpleNamespace(flash_attn_varlen_func=function)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake)
    monkeypatch.setattr("triptych.models.attention.is_deterministic", lambda: deterministic)
    q_TND, segments = torch.zeros(4, 2, 8), Segments(Partition.of([0, 1, 4]))
    attend = VARLEN_ATTENTIONS[Kernel.FLASH_ATTENTION_3]
    assert attend(q_TND, q_TND, q_TND, segments, True, 0.5) is q_TND
    assert asked == {"softmax_scale": 0.5, "causal": True, "deterministic": deterministic}


def test_without_a_compiler_nothing_of_triton_is_chosen():
    bare = dataclasses.replace(EVERYTHING, compiles=False)
    table = choose(Kernels.auto, Precision.bf16, bare)
    assert table.activation == table.rms_norm == (Kernel.TORCH, NO_COMPILER)
    assert table.attention.kernel is Kernel.FLASH_ATTENTION


def test_fp32_has_no_fused_attention():
    assert chosen(Kernels.auto, EVERYTHING, Precision.fp32)["attention"] is Kernel.PER_SEGMENT


@pytest.mark.parametrize(
    ("zero", "modules", "kernel"),
    [
        (Zero.megatron, [*PACKAGES], Kernel.TRANSFORMER_ENGINE),
        (Zero.megatron, ["apex"], Kernel.APEX),
        (Zero.megatron, ["liger_kernel"], Kernel.TORCH),
        (Zero.deepspeed, [*PACKAGES], Kernel.TORCH),
    ],
)
def test_adam(zero, modules, kernel):
    assert choose_adam(zero, Installed(True, frozenset(modules), compiles=True)).kernel is kernel


def test_another_package_called_apex_does_not_count(tmp_path, monkeypatch):
    """PyPI's apex has no optimizers."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "apex" not in Installed.here().modules
    (tmp_path / "apex" / "optimizers.py").touch()
    importlib.invalidate_caches()
    assert "apex" in Installed.here().modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes others")
def test_the_adam_of_megatron_is_the_one_that_is_named():
    from megatron.core import optimizer

    named = choose_adam(Zero.megatron, Installed.here()).kernel
    assert (named is Kernel.TORCH) == optimizer.USING_PYTORCH_OPTIMIZER

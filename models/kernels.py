"""Which kernel computes what: chosen once, from what is installed, each with its reason.

Fused kernels are optional everywhere; without them torch's own compute the same. What has run on a
GPU and what has not: docs/kernels.md.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple, Self

from triptych.configs.schema import Kernels, Precision, Zero
from triptych.parallel.device import HAS_CUDA, is_deterministic, is_hopper

VARLEN = "torch.nn.attention.varlen"
PACKAGES = {
    "flash_attn_interface": "FlashAttention 3",
    "flash_attn": "flash-attn",
    "liger_kernel": "liger-kernel",
    "transformer_engine": "Transformer Engine",
    "apex": "NVIDIA's apex",
    "fused_weight_gradient_mlp_cuda": "apex's fused_weight_gradient_mlp_cuda",
}
"""Module -> what people call it."""
USED_MODULES = {
    "flash_attn": "flash_attn.flash_attn_interface",
    "transformer_engine": "transformer_engine.pytorch",
    "apex": "apex.optimizers",
}
"""What is used of them: FlashAttention 4 has the first name without it, Transformer Engine for JAX
the second, another project on PyPI the third."""
NO_COMPILER = "Triton needs a C compiler and Python.h"


class Kernel(Enum):
    """Who computes something."""

    FLASH_ATTENTION_3 = "FlashAttention 3"
    FLASH_ATTENTION = "flash-attn"
    TORCH_VARLEN = "torch varlen_attn"
    PER_SEGMENT = "torch scaled_dot_product_attention, per segment"
    LIGER = "Liger"
    TRANSFORMER_ENGINE = "Transformer Engine"
    APEX = "apex FusedAdam"
    APEX_PRODUCT = "apex, within the matrix product"
    COMPILED = "torch.compile"
    CHUNKED = "ours, in chunks of supervised tokens"
    TORCH = "torch"


class Choice(NamedTuple):
    """A kernel, and why it is that one."""

    kernel: Kernel
    reason: str


@dataclass(frozen=True, slots=True)
class Installed:
    """What the choice depends on."""

    cuda: bool
    modules: frozenset[str]
    compiles: bool
    """Whether Triton's kernels can be built."""
    hopper: bool = False
    """Whether the device is what FlashAttention 3 is for."""
    deterministic: bool = False
    """Whether a run shall give the same bits each time."""

    @classmethod
    def here(cls) -> Self:
        """In this process; imports none of them."""
        modules = frozenset(filter(_is_there, (*PACKAGES, VARLEN)))
        return cls(HAS_CUDA, modules, _can_compile(), is_hopper(), is_deterministic())


def _is_there(module: str) -> bool:
    """Whether a package is installed with the part that is used; imports neither."""
    spec = importlib.util.find_spec(module)
    if spec is None or module not in USED_MODULES:
        return spec is not None
    return PathFinder.find_spec(USED_MODULES[module], spec.submodule_search_locations) is not None


def _can_compile() -> bool:
    """Triton builds launchers with a C compiler, against Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return bool(compiler) and headers.is_file() and _is_there("triton")


@dataclass(frozen=True, slots=True)
class KernelTable:
    """One choice for each thing that kernels exist for."""

    attention: Choice
    rms_norm: Choice
    layer_norm: Choice
    activation: Choice
    """SwiGLU and quick GELU."""
    rotary: Choice
    loss: Choice

    def rows(self) -> Iterator[tuple[str, Choice]]:
        """Name and choice, in order."""
        for field in fields(self):
            yield field.name, getattr(self, field.name)


def choose(kernels: Kernels, precision: Precision, installed: Installed) -> KernelTable:
    """The kernels of the model."""
    return KernelTable(
        attention=_attention(kernels, precision, installed),
        rms_norm=_rms_norm(kernels, installed),
        layer_norm=Choice(Kernel.TORCH, "one kernel as it is"),
        activation=_activation(kernels, installed),
        rotary=_optional("transformer_engine", Kernel.TRANSFORMER_ENGINE, kernels, installed),
        loss=Choice(Kernel.CHUNKED, "no other shares the vocabulary over tp ranks"),
    )


def choose_here(kernels: Kernels, precision: Precision) -> KernelTable:
    """The kernels of a model in this process."""
    return choose(kernels, precision, Installed.here())


def choose_adam(zero: Zero, installed: Installed) -> Choice:
    """Who updates the weights; megatron-core decides that by itself when it is imported."""
    if zero is Zero.deepspeed:
        return Choice(Kernel.TORCH, "given to DeepSpeed; its own would be compiled at start")
    for module, kernel in {
        "transformer_engine": Kernel.TRANSFORMER_ENGINE,
        "apex": Kernel.APEX,
    }.items():
        if module in installed.modules:
            return Choice(kernel, "megatron-core takes it where it is installed")
    fused = "fused; " if installed.cuda else ""
    return Choice(Kernel.TORCH, f"{fused}neither Transformer Engine nor NVIDIA's apex is installed")


def choose_grad_sum(kernels: Kernels, installed: Installed) -> Choice:
    """Who adds the weight gradients of linear layers to their fp32 buffers."""
    return _optional("fused_weight_gradient_mlp_cuda", Kernel.APEX_PRODUCT, kernels, installed)


def _attention(kernels: Kernels, precision: Precision, installed: Installed) -> Choice:
    if not installed.cuda:
        return Choice(Kernel.PER_SEGMENT, "no CUDA")
    if precision is Precision.fp32:
        return Choice(Kernel.PER_SEGMENT, "no kernel for packs takes fp32")
    there = "installed; its deterministic backward" if installed.deterministic else "installed"
    if kernels is Kernels.auto and "flash_attn_interface" in installed.modules and installed.hopper:
        return Choice(Kernel.FLASH_ATTENTION_3, there)
    if kernels is Kernels.auto and "flash_attn" in installed.modules:
        return Choice(Kernel.FLASH_ATTENTION, there)
    why_not = _why_not("flash_attn", kernels, installed)
    if VARLEN in installed.modules:
        return Choice(Kernel.TORCH_VARLEN, why_not)
    return Choice(Kernel.PER_SEGMENT, f"{why_not}, and this torch has no varlen_attn")


def _activation(kernels: Kernels, installed: Installed) -> Choice:
    if not installed.cuda:
        return Choice(Kernel.TORCH, "no CUDA")
    if kernels is Kernels.torch:
        return Choice(Kernel.TORCH, "train.kernels=torch")
    if not installed.compiles:
        return Choice(Kernel.TORCH, NO_COMPILER)
    return Choice(Kernel.COMPILED, "one kernel for value, one for gradient")


def _rms_norm(kernels: Kernels, installed: Installed) -> Choice:
    if installed.deterministic:
        return Choice(Kernel.TORCH, "train.deterministic=true")
    choice = _optional("liger_kernel", Kernel.LIGER, kernels, installed)
    if choice.kernel is Kernel.LIGER and not installed.compiles:
        return Choice(Kernel.TORCH, NO_COMPILER)
    return choice


def _optional(module: str, kernel: Kernel, kernels: Kernels, installed: Installed) -> Choice:
    if installed.cuda and kernels is Kernels.auto and module in installed.modules:
        return Choice(kernel, "installed")
    return Choice(Kernel.TORCH, _why_not(module, kernels, installed))


def _why_not(module: str, kernels: Kernels, installed: Installed) -> str:
    if not installed.cuda:
        return "no CUDA"
    if kernels is Kernels.torch:
        return "train.kernels=torch"
    return f"{PACKAGES[module]} is not installed"

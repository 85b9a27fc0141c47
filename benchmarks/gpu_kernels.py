"""Every kernel that is installed, alone, on a GPU: value and gradients against fp64 on a CPU.

    python benchmarks/gpu_kernels.py

A run takes one kernel for each thing; here all that could be taken have their turn, in the shapes
of the released models. One that fails does not keep the others from being compared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from triptych.benchmarks.table import Row, finish
from triptych.data.partition import Partition
from triptych.models.activations import SwiGLU, quick_gelu
from triptych.models.attention import VARLEN_ATTENTIONS, Segments
from triptych.models.kernels import VARLEN, Installed, Kernel
from triptych.models.loss import SummedLoss
from triptych.models.norm import LayerNorm, LigerRMSNorm, RMSNorm
from triptych.models.rotary import turn
from triptych.parallel.mesh import build_mesh, init_distributed, shutdown

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

COMMAND = "python benchmarks/gpu_kernels.py"
BARS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference / largest element, of value and gradients; a step of bf16 is 8e-3."""
BOUNDS = [0, 1, 130, 300, 777]
"""Segments of a pack."""
WIDTH, MLP_WIDTH, VOCABULARY = 1536, 4480, 4096

Function = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class KernelComparison:
    """A kernel, and the same by torch on a CPU."""

    what: str
    kernel: Kernel
    function: Function
    plain: Function
    shapes: Sequence[tuple[int, ...]]
    """Of the inputs that are drawn, and have gradients."""
    dtypes: Sequence[torch.dtype] = tuple(BARS)


def comparisons(installed: Installed, device: torch.device) -> Iterator[KernelComparison]:
    """All that can be made here."""
    yield from attentions(installed, device)
    yield from norms(installed)
    yield from activations(installed)
    yield from rotaries(installed, device)
    yield loss(device)


def attentions(installed: Installed, device: torch.device) -> Iterator[KernelComparison]:
    """A decoder's, grouped queries of 128 that look back; the ViT's, heads of 80, both ways."""
    modules, half = installed.modules, (torch.bfloat16,)
    kernels = {
        Kernel.PER_SEGMENT: tuple(BARS),
        Kernel.TORCH_VARLEN: half if VARLEN in modules else (),
        Kernel.FLASH_ATTENTION: half if "flash_attn" in modules else (),
        Kernel.FLASH_ATTENTION_3: (
            half if "flash_attn_interface" in modules and installed.hopper else ()
        ),
    }
    for kernel, dtypes in kernels.items():
        for what, heads, kv_heads, head_dim, causal in (
            ("attention, decoder", 12, 2, 128, True),
            ("attention, ViT", 16, 16, 80, False),
        ):
            shapes = [(BOUNDS[-1], count, head_dim) for count in (heads, kv_heads, kv_heads)]
            attend = attention(kernel, device, causal, head_dim)
            plain = attention(Kernel.PER_SEGMENT, torch.device("cpu"), causal, head_dim)
            if dtypes:
                yield KernelComparison(what, kernel, attend, plain, shapes, dtypes)


def attention(kernel: Kernel, device: torch.device, causal: bool, head_dim: int) -> Function:
    segments = Segments(Partition.of(BOUNDS).each(lambda cu_seqlens: cu_seqlens.to(device)))
    scale = 1 / math.sqrt(head_dim)
    return lambda q, k, v: VARLEN_ATTENTIONS[kernel](q, k, v, segments, causal, scale)


def norms(installed: Installed) -> Iterator[KernelComparison]:
    def of(kind: type[nn.Module]) -> Function:
        def normalize(x: Tensor, *parameters: Tensor) -> Tensor:
            config = SimpleNamespace(params_dtype=x.dtype, sequence_parallel=False)
            module = kind(config, WIDTH)
            names = [name for name, _ in module.named_parameters()]
            result: Tensor = functional_call(module, dict(zip(names, parameters, strict=True)), x)
            return result

        return normalize

    rows, weight = (BOUNDS[-1], 1, WIDTH), (WIDTH,)
    yield KernelComparison(
        "LayerNorm", Kernel.TORCH, of(LayerNorm), of(LayerNorm), (rows, weight, weight)
    )
    yield KernelComparison("RMSNorm", Kernel.TORCH, of(RMSNorm), of(RMSNorm), (rows, weight))
    if "liger_kernel" in installed.modules and installed.compiles:
        yield KernelComparison(
            "RMSNorm", Kernel.LIGER, of(LigerRMSNorm), of(RMSNorm), (rows, weight)
        )


def activations(installed: Installed) -> Iterator[KernelComparison]:
    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    rows = (BOUNDS[-1], 1, MLP_WIDTH)
    for compiled in (False, True) if installed.compiles else (False,):
        kernel = Kernel.COMPILED if compiled else Kernel.TORCH
        yield KernelComparison("SwiGLU", kernel, SwiGLU(None, compiled=compiled), swiglu, [rows])
        gelu = quick_gelu(compiled=compiled)
        yield KernelComparison(
            "quick GELU", kernel, gelu, lambda x: x * torch.sigmoid(1.702 * x), [rows]
        )


def rotaries(installed: Installed, device: torch.device) -> Iterator[KernelComparison]:
    """Angles as far as a pack's positions go."""
    heads = (BOUNDS[-1], 1, 12, 128)
    angles = 8192 * torch.rand(BOUNDS[-1], 1, 1, 64, generator=torch.Generator().manual_seed(2))
    angles = torch.cat([angles, angles], dim=-1)
    on_device = angles.to(device)

    def plain(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = angles.double().cos().to(x.dtype), angles.double().sin().to(x.dtype)
        return x * cos + torch.cat([-high, low], dim=-1) * sin

    yield KernelComparison("rotary", Kernel.TORCH, lambda x: turn(x, on_device), plain, [heads])
    if "transformer_engine" in installed.modules:
        config = SimpleNamespace(
            apply_rope_fusion=True, mrope_section=None, rotary_interleaved=False
        )
        yield KernelComparison(
            "rotary",
            Kernel.TRANSFORMER_ENGINE,
            lambda x: apply_rotary_pos_emb(x, on_device, config),
            plain,
            [heads],
        )


def loss(device: torch.device) -> KernelComparison:
    """The mean over all rows; hidden states and weights so small that probabilities differ."""
    rows = BOUNDS[-1]
    labels = torch.randint(VOCABULARY, (rows,), generator=torch.Generator().manual_seed(3))
    on_device, every = labels.to(device), torch.arange(rows, device=device)

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        summed = SummedLoss(nn.Parameter(torch.empty(0)), dist.group.WORLD, sequence_parallel=False)
        return functional_call(summed, {"weight": weight}, (hidden, on_device, every)) / rows

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(hidden.squeeze(1) @ weight.T, labels)

    shapes = ((rows, 1, WIDTH), (VOCABULARY, WIDTH))
    return KernelComparison("loss", Kernel.CHUNKED, chunked, plain, shapes)


def draw(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """In bf16's values, so that no dtype rounds them; matrices of weights at 1/sqrt(width)."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0))
        .bfloat16()
        .double()
        for shape in shapes
    ]


def value_and_gradients(
    function: Function, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """In fp64 on the CPU, whatever they were computed in; the upstream gradient is random."""
    placed = [x.to(device, dtype).requires_grad_() for x in inputs]
    value = function(*placed)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = torch.autograd.grad(value, placed, upstream.to(device, value.dtype))
    return [x.detach().cpu().double() for x in (value, *grads)]


def apart(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference / largest element, of the worst tensor."""
    return max(
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(got, want, strict=True)
    )


def compare(
    comparison: KernelComparison, device: torch.device
) -> Iterator[tuple[str, float, float]]:
    """Dtype, distance from fp64 on ``device``, and that of torch in the same dtype on a CPU."""
    cpu = torch.device("cpu")
    inputs = draw(comparison.shapes)
    exact = value_and_gradients(comparison.plain, inputs, torch.float64, cpu)
    for dtype in comparison.dtypes:
        got = value_and_gradients(comparison.function, inputs, dtype, device)
        on_cpu = value_and_gradients(comparison.plain, inputs, dtype, cpu)
        yield dtype, apart(got, exact), apart(on_cpu, exact)


def report(comparison: KernelComparison, device: torch.device) -> Row:
    """Print a line for each dtype; a kernel that fails is a bar not met."""
    claim = f"{comparison.what}, {comparison.kernel.value}"
    figures, bars, met = [], [], True
    try:
        for dtype, distance, on_cpu in compare(comparison, device):
            name, bar = str(dtype).removeprefix("torch."), BARS[dtype]
            print(
                f"| {comparison.what} | {comparison.kernel.value} | {name} "
                f"| {distance:.1e} | {on_cpu:.1e} | {bar:.0e} |",
                flush=True,
            )
            figures.append(f"{name} {distance:.1e}")
            bars.append(f"{bar:.0e}")
            met = met and distance <= bar
    except Exception as error:  # a kernel's own, of any kind: told, and the next one has its turn
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Row(claim, f"failed: {reason}", "runs", False, COMMAND)
    return Row(claim, " / ".join(figures), " / ".join(bars), met, COMMAND)


def main() -> list[Row]:
    """Compare, and print Markdown; returns a row for each kernel."""
    init_distributed(600)
    mesh = build_mesh(1, 1, seed=0, timeout_s=600)
    print(
        "Largest difference / largest element, of value and gradients, against fp64 on the CPU.\n\n"
        "| what | kernel | dtype | here | torch on the CPU | bar |\n|---|---|---|---|---|---|"
    )
    installed = Installed.here()
    rows = [report(one, mesh.device) for one in comparisons(installed, mesh.device)]
    shutdown()
    return rows


if __name__ == "__main__":
    finish(main())

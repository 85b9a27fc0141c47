"""What machine this is: GPUs, versions, and the kernels that a run would take.

python benchmarks/machine.py
"""

import importlib.metadata
import os
import platform
import sys
import time

import torch

from triptych.checkpoints.environment import ROOT, git_state
from triptych.configs.schema import Kernels, Precision, Zero
from triptych.models.kernels import Installed, choose, choose_adam
from triptych.parallel.device import HAS_CUDA

PACKAGES = (
    "megatron-core",
    "deepspeed",
    "transformers",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "liger-kernel",
    "transformer-engine",
    "apex",
)
GIB = 2**30


def main() -> None:
    """Print Markdown; fails where there is no GPU."""
    if not HAS_CUDA:
        sys.exit(
            f"torch {torch.__version__} sees no GPU here"
            "  -> docs/install.md; python benchmarks/speed.py measures a CPU"
        )
    print("| | |\n|---|---|")
    for name, value in {**machine(), **versions()}.items():
        print(f"| {name} | {value} |")
    print("\n| kernel | bf16 | fp32 | why, in bf16 |\n|---|---|---|---|")
    installed = Installed.here()
    tables = [
        choose(Kernels.auto, precision, installed).rows() for precision in reversed(Precision)
    ]
    for (name, half), (_, single) in zip(*tables, strict=True):
        print(f"| {name} | {half.kernel.value} | {single.kernel.value} | {half.reason} |")
    adam = choose_adam(Zero.megatron, installed)
    print(f"| adam | {adam.kernel.value} | {adam.kernel.value} | {adam.reason} |")


def machine() -> dict[str, str]:
    """Day and commit; GPUs as the driver names them; the processor."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    named = [f"{gpu.name}, {gpu.total_memory / GIB:.1f} GiB" for gpu in gpus]
    counts = {name: named.count(name) for name in named}
    state = git_state(ROOT) or {"commit": "none, no clone", "changed": []}
    changed = f", {len(state['changed'])} files changed" if state["changed"] else ""
    return {
        "day": time.strftime("%Y-%m-%d"),
        "commit": state["commit"][:14] + changed,
        "GPUs": "; ".join(f"{count} x {name}" for name, count in counts.items()),
        "CPU": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }


def versions() -> dict[str, str]:
    """Of Python, torch and what it brings, and of each package that matters and is installed."""
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else "none"
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "NCCL": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    main()

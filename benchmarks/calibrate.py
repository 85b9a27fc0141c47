"""How close each kind of work comes to the peak on this device: ``efficiency`` of a cluster file.

    python benchmarks/calibrate.py model=qwen2_vl_7b cluster=h200

Takes the overrides of launch/pretrain.py, for sizes, precision, seq_len and the expected images.
Times forward and backward passes of a model with few layers, at tp 1, over batches that differ in
one thing only; differences of medians leave that thing alone. Prints what to put into a file of
the group ``cluster``. Without ``cluster.peak_tflops``, the peak is that of a large matrix product,
measured alongside.
On a CPU, time is CPU-seconds of one thread.
"""

import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from triptych.configs.compose import load_config
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Config, Kernels, ParallelConfig
from triptych.costs.flops import (
    adapter_flops,
    head_flops,
    layer_flops,
    vit_flops,
)
from triptych.data.batch import Batch
from triptych.data.loading.collate import Segment, collate
from triptych.data.types import SampleId
from triptych.models.build import build_model
from triptych.models.feed import on_device
from triptych.models.init import init_parameters
from triptych.models.kernels import choose_here
from triptych.models.qwen_vl.model import Qwen2VL
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.parallel.device import HAS_CUDA, synchronize
from triptych.parallel.dtypes import DTYPES
from triptych.parallel.mesh import Mesh, build_mesh, init_distributed, shutdown

NUM_ROUNDS = 7
DEPTH = 3
"""Decoder layers of the larger model, and ViT layers of both; the smaller has one decoder layer."""


@dataclass(frozen=True, slots=True)
class Batches:
    """All of equally many tokens; differences between two of them are one kind of work."""

    short: Batch
    """Text in segments as long as an image and its text, nothing supervised."""
    long: Batch
    """The same in one segment."""
    supervised: Batch
    """The load of ``short``, every token supervised."""
    images: Batch
    """The load of ``short``, most tokens of each segment those of an image."""


def make_batches(config: Config) -> Batches:
    """Packs of about ``train.seq_len`` tokens, images of about ``data.image_patches``."""
    side = 2 * max(1, round(math.sqrt(config.data.image_patches) / 2))
    length = side**2 // 4 + 16
    count = max(2, config.train.seq_len // length)
    grid = np.array([[1, side, side]], dtype=np.int64)
    none = np.empty((0, 3), dtype=np.int64)
    shape = (side**2, config.model.vision.patch_dim)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    text = np.ones(length, dtype=np.int32)
    shown = text.copy()
    shown[1 : 1 + side**2 // 4] = config.model.tokens.image_pad

    def batch(ids: np.ndarray, count: int, *, target: int = 0, image: bool = False) -> Batch:
        segment = Segment(
            SampleId(0, 0),
            ids,
            np.full(len(ids), target, dtype=np.uint8),
            grid if image else none,
            (pixels,) if image else (),
        )
        return collate([segment] * count, config.model, pad_to=1, with_pixels=True)

    return Batches(
        short=batch(text, count),
        long=batch(np.tile(text, count), 1),
        supervised=batch(text, count, target=1),
        images=batch(shown, count, image=True),
    )


def make_model(config: Config, num_layers: int, mesh: Mesh) -> tuple[ModelConfig, Qwen2VL]:
    """The run's model with few layers; everything trains."""
    model = replace(
        config.model,
        vision=replace(config.model.vision, depth=DEPTH),
        language=replace(config.model.language, num_layers=num_layers),
    )
    precision = config.train.precision
    kernels = choose_here(Kernels.auto, precision)
    chunks = build_model(model, ParallelConfig(), precision, [num_layers], mesh, kernels)
    init_parameters(chunks, sharding_table(model), mesh, 0)
    return model, chunks[0]


def medians(tasks: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each task, taken by turns."""
    clock = time.perf_counter if HAS_CUDA else time.process_time
    times: list[list[float]] = [[] for _ in tasks]
    for round_number in range(NUM_ROUNDS + 1):
        for task, taken in zip(tasks, times, strict=True):
            synchronize()
            begin = clock()
            task()
            synchronize()
            if round_number:  # the first warms up
                taken.append(clock() - begin)
    return [statistics.median(taken) for taken in times]


def step(model: Qwen2VL, batch: Batch, mesh: Mesh) -> Callable[[], None]:
    """Forward and backward pass; the batch is already on the device."""
    [placed] = on_device([batch], mesh, mesh.places(1)[0])

    def run() -> None:
        model(placed).backward()
        model.zero_grad(set_to_none=True)

    return run


def product(config: Config, mesh: Mesh) -> tuple[float, Callable[[], Tensor]]:
    """FLOPs of a matrix product, on a GPU twice as large as a pack is long, and the product."""
    size = min(8192, max(1024, 2 * config.train.seq_len)) if HAS_CUDA else 1024
    left = torch.randn(size, size, device=mesh.device, dtype=DTYPES[config.train.precision])
    return 2.0 * size**3, lambda: left.mm(left)


def calibrate(config: Config, mesh: Mesh) -> tuple[float, dict[str, float]]:
    """Measure.

    Returns:
        TFLOP/s of a large matrix product, and of each kind of work.
    """
    batches = make_batches(config)
    sizes, model = make_model(config, DEPTH, mesh)
    _, shallow = make_model(config, 1, mesh)
    product_flops, multiply = product(config, mesh)
    tasks = [
        step(shallow, batches.short, mesh),
        *(
            step(model, batch, mesh)
            for batch in (batches.short, batches.long, batches.supervised, batches.images)
        ),
        multiply,
    ]
    one_layer, short, long, supervised, images, gemm = medians(tasks)
    few, many, shown = (b.workload for b in (batches.short, batches.long, batches.images))
    layer = layer_flops(sizes.language, few)
    pairs = layer_flops(sizes.language, many).attention - layer.attention
    attention = rate(3 * pairs, (long - short) / DEPTH, "attention")
    in_attention = 3 * layer.attention / attention
    linear_s = (short - one_layer) / (DEPTH - 1) - in_attention
    head = head_flops(sizes, batches.supervised.workload).total
    vision = vit_flops(sizes.vision, shown).total + adapter_flops(sizes, shown).total
    rates = {
        "vit": rate(3 * vision, images - short, "vit"),
        "linear": rate(3 * layer.linear, linear_s, "linear"),
        "attention": attention,
        "head": rate(3 * head, supervised - short, "head"),
    }
    tera = {name: value / 1e12 for name, value in rates.items()}
    return product_flops / gemm / 1e12, tera


def rate(flops: float, seconds: float, name: str) -> float:
    """FLOP/s."""
    if seconds <= 0:
        sys.exit(
            f"{name} took no measurable time: the differences drown in noise"
            "  -> leave the device to this measurement, or take a larger model or train.seq_len"
        )
    return flops / seconds


def main(argv: Sequence[str]) -> None:
    """Print a cluster file's lines."""
    config = load_config(argv)
    init_distributed(config.cluster.timeout_s)
    torch.set_num_threads(1)
    mesh = build_mesh(1, 1, seed=0, timeout_s=config.cluster.timeout_s)
    gemm, rates = calibrate(config, mesh)
    shutdown()
    peak = config.cluster.peak_tflops or gemm
    known = "" if config.cluster.peak_tflops else "peak_tflops, "
    device = torch.cuda.get_device_name() if HAS_CUDA else f"one thread of {platform.machine()}"
    print(f"# {device}, {config.model.name}, {config.train.precision.name}, tp 1.")
    print(f"# A large matrix product: {gemm:.4g} TFLOP/s.")
    print(f"# {', '.join(f'{name} {value:.4g}' for name, value in rates.items())} TFLOP/s.")
    shares = ", ".join(f"{name}: {value / peak:.2f}" for name, value in rates.items())
    print(f"peak_tflops: {peak:.4g}\nefficiency: {{{shares}}}\nmeasured: [{known}efficiency]")


if __name__ == "__main__":
    main(sys.argv[1:])

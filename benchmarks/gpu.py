"""One GPU: ours against transformers in bf16, utilisation, and peak memory against the plan.

    python benchmarks/gpu.py                       # model=qwen2_vl_2b, 4096 tokens a pack
    python benchmarks/gpu.py model=qwen2_vl_7b     # takes the overrides of launch/pretrain.py
    python benchmarks/gpu.py --miniature           # few small samples, one round: does it run?

The same samples and random weights on both sides; a step is the forward and backward pass of one
global batch. Losses are compared first, then the arms take turns, with a large matrix product on
random data among them: the rate that the device really has is the peak of the shares printed.
transformers gets Liger's kernels where they are installed, and in packs the attention kernel of
ours. Memory is that of a whole training step of ours.
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from triptych.benchmarks.arms import (
    Round,
    batches_of,
    build_arms,
    build_both,
    in_turns,
    require_same_loss,
)
from triptych.benchmarks.calibrate import product
from triptych.benchmarks.gpu_check import with_defaults
from triptych.benchmarks.samples import Mix, draw_samples, num_tokens
from triptych.benchmarks.table import Row, finish, spread
from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.costs.activation_memory import GPU, Activations
from triptych.costs.flops import training_flops
from triptych.costs.layer_split import layers_per_chunk
from triptych.costs.memory import pp_stage_memory
from triptych.costs.parameter_shards import pp_stage_shards
from triptych.data.batch import Batch, Step
from triptych.models.kernels import Installed, choose
from triptych.parallel.device import HAS_CUDA, device_name, synchronize
from triptych.parallel.mesh import Mesh, build_mesh, init_distributed, shutdown
from triptych.train.engine import Engine
from triptych.train.step import train_step

NUM_ROUNDS = 7
MIX = Mix(num_samples=64, sides=(12, 48), text=(192, 1024))
"""Of 2B, both models and four of the longest fit 80 GB: ours by the plan, theirs by a guess."""
MINIATURE = Mix(num_samples=4, sides=(4, 12), text=(16, 64))
ROWS = 4
"""Samples in a padded batch."""
SAME_LOSS = 5e-3
"""Relative, in bf16."""
LEAST_RATIO, LEAST_OVER_PADDED, LEAST_SHARE, MEMORY_BAND = 1.0, 1.7, 0.5, 0.1
GIB = 2**30
COMMAND = "python benchmarks/gpu.py"


def give_kernels(model: nn.Module) -> str:
    """Liger's kernels to transformers, where they are; says what it has."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "transformers without Liger, which is not installed"
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_vl

    apply_liger_kernel_to_qwen2_vl(model=model)
    return "transformers with Liger"


def seconds(task: Callable[[], object]) -> float:
    """Seconds by the clock, until the device is done."""
    synchronize()
    begin = time.perf_counter()
    task()
    synchronize()
    return time.perf_counter() - begin


def model_flops(config: Config, batches: Sequence[Batch]) -> float:
    """FLOPs of the step; the same for every arm, whatever it computes in vain."""
    return sum(
        training_flops(config.model, batch.workload, vit=True, adapter=True, llm=True)
        for batch in batches
    )


def planned_bytes(config: Config, batches: Sequence[Batch]) -> int:
    """At the fullest, with the pack that needs most: of vision it may not be the longest."""
    layers = layers_per_chunk(config)
    shards = pp_stage_shards(config, layers)
    num_microbatches = len(batches)
    return max(
        stage.total
        for batch in batches
        for stage in pp_stage_memory(
            Activations(config, batch.workload, GPU),
            layers,
            shards,
            dp=1,
            num_microbatches=num_microbatches,
        )
    )


def peak_bytes(engine: Engine, batches: Sequence[Batch]) -> int:
    """Allocated by torch during a second training step; the first one makes the optimizer state."""
    rates = dict.fromkeys(("vit", "adapter", "llm"), 0.0)
    step = Step(list(batches), tuple(range(len(batches))), unreadable=[], num_sources=1)
    before = torch.cuda.memory_allocated() if HAS_CUDA else 0
    for _ in (1, 2):
        if HAS_CUDA:
            torch.cuda.reset_peak_memory_stats()
        train_step(engine, step, rates)
    print(f"allocated before the first step: {before / GIB:.2f} GiB")
    return torch.cuda.max_memory_allocated() if HAS_CUDA else 0


def report(rounds: Sequence[Round], tokens: int, flops: float) -> list[Row]:
    """Print a line for each arm; returns a row for each bar."""
    print(
        "| arm | tokens / s | model TFLOP/s | of the GEMM rate | ours is faster by |\n"
        "|---|---|---|---|---|"
    )
    rows, over = [], {}
    for name in rounds[0][1]:
        speeds = [tokens / seconds[name] for _, seconds in rounds]
        teras = [flops / seconds[name] / 1e12 for _, seconds in rounds]
        shares = [flops / seconds[name] / rate for rate, seconds in rounds]
        ratios = [seconds[name] / seconds["ours"] for _, seconds in rounds]
        cells = (spread(speeds, 0), spread(teras, 1), spread(shares), spread(ratios))
        print(f"| {name} | {' | '.join(cells)} |")
        if name == "ours":
            met = statistics.median(shares) >= LEAST_SHARE
            claim = "model FLOPs of ours, share of the GEMM rate"
            rows.append(Row(claim, spread(shares), f">= {LEAST_SHARE}", met, COMMAND))
        else:
            over[name] = ratios
    best = min(over, key=lambda name: statistics.median(over[name]))
    padded = "transformers, padded"
    for claim, name, least in (
        (f"tokens / s, ours over the fastest other, {best}", best, LEAST_RATIO),
        (f"tokens / s, ours over {padded}", padded, LEAST_OVER_PADDED),
    ):
        met = statistics.median(over[name]) >= least
        rows.append(Row(claim, spread(over[name]), f">= {least}", met, COMMAND))
    print(f"\nGEMM rate: {spread([rate / 1e12 for rate, _ in rounds], 1)} TFLOP/s")
    return rows


def memory_row(engine: Engine, config: Config, batches: Sequence[Batch]) -> Row:
    """Peak of a training step against the plan; nothing else may live on the device."""
    peak, planned = peak_bytes(engine, batches), planned_bytes(config, batches)
    figure = f"{peak / GIB:.2f} GiB, planned {planned / GIB:.2f}"
    met = abs(peak / planned - 1) <= MEMORY_BAND
    return Row("peak memory of a training step", figure, f"within {MEMORY_BAND:.0%}", met, COMMAND)


def compare(config: Config, mix: Mix, mesh: Mesh, *, num_rounds: int, rows: int) -> list[Row]:
    """The whole of it, on the device of ``mesh``."""
    samples = draw_samples(mix, config.model)
    batches = batches_of(samples, config)
    tokens = sum(map(num_tokens, samples))
    engine, model = build_both(config, mesh)
    kernels = choose(config.train.kernels, config.train.precision, Installed.here())
    print(
        f"{config.model.name}, {config.train.precision.name}, {len(samples)} samples of {tokens:,} "
        f"tokens in {len(batches)} packs; attention: {kernels.attention.kernel.value}; "
        f"{give_kernels(model)}; {num_rounds} rounds"
    )
    arms = build_arms(engine, model, config, samples, rows=rows)
    require_same_loss({name: arm() for name, arm in arms.items()}, SAME_LOSS)
    multiplication = product(config, mesh)
    seconds(multiplication[1])  # warms up, as the arms have
    rounds = list(in_turns(arms, seconds, multiplication, num_rounds))
    found = report(rounds, tokens, model_flops(config, batches))
    model.to("cpu")
    arms.clear()
    if HAS_CUDA:
        torch.cuda.empty_cache()
    return [*found, memory_row(engine, config, batches)]


def main(argv: Sequence[str] = ()) -> list[Row]:
    """Measure, and print Markdown; returns a row for each bar."""
    if not HAS_CUDA:
        print("nothing measured: there is no GPU here  -> python benchmarks/speed.py, on a CPU")
        return []
    config = load_config(with_defaults([word for word in argv if word != "--miniature"]))
    mix, num_rounds = (MINIATURE, 1) if "--miniature" in argv else (MIX, NUM_ROUNDS)
    init_distributed(config.cluster.timeout_s)
    mesh = build_mesh(1, 1, seed=0, timeout_s=config.cluster.timeout_s)
    print(device_name())
    rows = compare(config, mix, mesh, num_rounds=num_rounds, rows=ROWS)
    shutdown()
    return rows


if __name__ == "__main__":
    finish(main(sys.argv[1:]))

"""Speed of a training step on a CPU: ours against transformers, same weights, same samples.

python benchmarks/speed.py            # 7 rounds, some twenty CPU-minutes

One step is the forward and backward pass of one global batch of 48 samples of mixed resolution, in
fp32, on one thread. The arms take turns in every round, and the rate of a matrix product is
measured among them. All arms must agree in the loss before anything is timed.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from triptych.benchmarks.arms import Arm, Round, build_arms, build_both, in_turns, require_same_loss
from triptych.benchmarks.samples import Mix, draw_samples, num_tokens
from triptych.benchmarks.table import Row, print_rows, spread
from triptych.configs.compose import load_config
from triptych.configs.model_schema import LanguageConfig, ModelConfig, TokensConfig, VisionConfig
from triptych.configs.schema import Config
from triptych.costs.flops import parameters
from triptych.parallel.mesh import build_mesh, init_distributed, shutdown

NUM_ROUNDS = 7
MIX = Mix(num_samples=48, sides=(4, 24), text=(32, 400))
ROWS = 8
PACK_TOKENS = 1024
SAME_LOSS = 2e-6
"""Relative."""
COMMAND = "python benchmarks/speed.py"
LEAST_RATIO = {
    "transformers, padded": 1.5,
    "transformers, grouped by length": 1.05,
    "transformers, packed": 0.97,
}
"""How many times as fast ours has to be."""
MODEL = ModelConfig(
    name="speed",
    vision=VisionConfig(depth=6, hidden_size=256, num_heads=4, intermediate_size=1024),
    language=LanguageConfig(
        hidden_size=384,
        num_layers=7,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=2048,
        vocab_size=7872,
        mrope_section=[8, 12, 12],
    ),
    tokens=TokensConfig(
        endoftext=0, im_start=1, im_end=2, vision_start=3, vision_end=4, image_pad=5, video_pad=6
    ),
)
"""31.8M parameters, 10 % each in embedding and head, 16 % in the ViT."""


def run_of(model: ModelConfig) -> Config:
    """The configuration of our arm."""
    config: Config = load_config(["train.precision=fp32", f"train.seq_len={PACK_TOKENS}"])
    config.model = model
    return config


def product() -> tuple[float, Callable[[], None]]:
    """FLOPs of sixteen fp32 matrix products, and the products."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def multiply() -> None:
        for _ in range(16):
            left @ right

    return 16 * 2 * 1024**3, multiply


def cpu_seconds(task: Callable[[], object]) -> float:
    """CPU-seconds of this process."""
    begin = time.process_time()
    task()
    return time.process_time() - begin


def check(arms: dict[str, Arm]) -> dict[str, int]:
    """Run every arm once; gives the FLOPs that it executes.

    Raises:
        SystemExit: two arms disagree in the loss.
    """
    losses, flops = {}, {}
    for name, arm in arms.items():
        with FlopCounterMode(display=False) as counter:
            losses[name] = arm()
        flops[name] = counter.get_total_flops()
    require_same_loss(losses, SAME_LOSS)
    return flops


def report(rounds: Sequence[Round], flops: dict[str, int], tokens: int) -> list[Row]:
    """Print a line for each arm; returns a row for each rival."""
    print(
        "| arm | tokens / CPU-s | share of the GEMM rate | ours is faster by |\n|---|---|---|---|"
    )
    rows = []
    for name in flops:
        speeds = [tokens / seconds[name] for _, seconds in rounds]
        shares = [flops[name] / seconds[name] / rate for rate, seconds in rounds]
        ratios = [seconds[name] / seconds["ours"] for _, seconds in rounds]
        print(f"| {name} | {spread(speeds, 0)} | {spread(shares)} | {spread(ratios)} |")
        if name in LEAST_RATIO:
            least = LEAST_RATIO[name]
            claim = f"tokens / CPU-s, ours over {name}, {NUM_ROUNDS} rounds"
            met = statistics.median(ratios) >= least
            rows.append(Row(claim, spread(ratios), f">= {least}", met, COMMAND))
    print(f"\nGEMM rate: {spread([rate / 1e9 for rate, _ in rounds], 1)} GFLOP / CPU-s")
    return rows


def main() -> list[Row]:
    """Check that all agree, measure, and print Markdown; returns a row for each rival."""
    torch.set_num_threads(1)
    init_distributed(60)
    samples = draw_samples(MIX, MODEL)
    tokens = sum(map(num_tokens, samples))
    targets = sum(int(sample.targets.sum()) for sample in samples)
    print(
        f"{parameters(MODEL).total:,} parameters, {len(samples)} samples of {tokens:,} tokens, "
        f"{targets / tokens:.0%} of them targets; {NUM_ROUNDS} rounds, one thread, fp32"
    )
    config = run_of(MODEL)
    engine, model = build_both(config, build_mesh(1, 1, seed=0, timeout_s=60))
    arms = build_arms(engine, model, config, samples, rows=ROWS)
    flops = check(arms)
    rounds = list(in_turns(arms, cpu_seconds, product(), NUM_ROUNDS))
    shutdown()
    return report(rounds, flops, tokens)


if __name__ == "__main__":
    print_rows(main())

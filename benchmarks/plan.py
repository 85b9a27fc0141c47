"""Speed of planning, fill of packs and balance of ranks, on a synthetic mixture; a few seconds.

python benchmarks/plan.py

Five sources (captions, OCR, interleaved articles, VQA, text) with image sides drawn log-uniformly
and text lengths drawn log-normally, packed to 8192 tokens in windows of 4096 samples.
"""

import time
from functools import partial

import numpy as np
from numpy.typing import NDArray

from triptych.configs.compose import load_config
from triptych.configs.schema import ModelConfig, Oversize
from triptych.costs.flops import Workload, training_flops
from triptych.data.plan.balance import assign
from triptych.data.plan.plan import Plan
from triptych.data.plan.sources import PlanSource

NUM_SAMPLES = 200_000
SEQ_LEN, WINDOW = 8192, 4096
MIXTURE = {
    # source: (weight, images per sample, shortest and longest side, median and spread of the text)
    "captions": (0.50, 1, 112, 1344, 40, 0.6),
    "ocr": (0.15, 1, 448, 2000, 300, 0.9),
    "interleaved": (0.15, 4, 224, 896, 600, 0.8),
    "vqa": (0.10, 1, 224, 1120, 120, 0.7),
    "text": (0.10, 0, 28, 28, 700, 1.0),
}
LAYOUTS = [
    # model, data-parallel ranks, microbatches, packs per microbatch
    ("qwen2_vl_2b", 64, 8, 1),
    ("qwen2_vl_2b", 16, 4, 2),
    ("qwen2_vl_7b", 32, 16, 1),
    ("qwen2_vl_7b", 8, 4, 1),
    ("qwen2_vl_72b", 16, 32, 1),
]


def draw_source(name: str, rng: np.random.Generator) -> PlanSource:
    """Token and patch counts of one source."""
    weight, num_images, low, high, median, spread = MIXTURE[name]
    sides = np.exp(rng.uniform(np.log(low), np.log(high), (2, NUM_SAMPLES, num_images)))
    patches = (4 * np.maximum(1, np.rint(sides / 28)).prod(axis=0)).astype(np.int64)
    text = np.clip(rng.lognormal(np.log(median), spread, NUM_SAMPLES), 8, 6000).astype(np.int64)
    tokens: NDArray[np.int64] = patches.sum(axis=1) // 4 + 2 * num_images + text
    return PlanSource(name, weight, tokens, patches.sum(axis=1), (patches**2).sum(axis=1))


def make_plan(max_patches: int) -> Plan:
    """The mixture under a bound of patches per pack."""
    rng = np.random.default_rng(0)
    return Plan(
        [draw_source(name, rng) for name in MIXTURE],
        seed=0,
        seq_len=SEQ_LEN,
        max_patches=max_patches,
        window=WINDOW,
        oversize=Oversize.skip,
    )


def measure_packing(max_patches: int, num_packs: int = 8000) -> None:
    """Print speed and fill."""
    plan = make_plan(max_patches)
    begin = time.process_time()
    packs = plan.first_packs(num_packs)
    seconds = time.process_time() - begin
    samples_per_s = sum(len(pack.samples) for pack in packs) / seconds
    tokens = sum(pack.num_tokens for pack in packs) / (num_packs * SEQ_LEN)
    patches = sum(pack.num_patches for pack in packs) / (num_packs * max_patches)
    print(
        f"| {max_patches} | {samples_per_s:,.0f} samples / CPU-s | {tokens:.4f} | {patches:.4f} |"
    )


def measure_balance(
    name: str, dp_size: int, num_microbatches: int, micro_batch_size: int, num_steps: int = 8
) -> None:
    """Print the cost of the slowest rank over the mean, as packs come and balanced."""
    model: ModelConfig = load_config([f"model={name}"]).model
    cost = partial(training_flops, model, vit=True, adapter=True, llm=True)
    plan = make_plan(max_patches=4 * SEQ_LEN)
    cursor = plan.start
    as_they_come, balanced, num_samples, seconds = [], [], 0, 0.0
    for _ in range(num_steps):
        begin = time.process_time()
        packs, cursor = plan.next_packs(cursor, dp_size * num_microbatches * micro_batch_size)
        loads: list[Workload] = [plan.workload(pack) for pack in packs]
        costs = [cost(load) for load in loads]
        ranks = assign(costs, dp_size=dp_size, micro_batch_size=micro_batch_size)
        seconds += time.process_time() - begin
        num_samples += sum(len(pack.samples) for pack in packs)
        mean = sum(costs) / dp_size
        as_they_come.append(max(sum(costs[rank::dp_size]) for rank in range(dp_size)) / mean)
        by_rank = [sum(costs[i] for group in rank for i in group) for rank in ranks]
        balanced.append(max(by_rank) / mean)
    print(
        f"| {name} | {dp_size} | {num_microbatches} x {micro_batch_size} "
        f"| {np.mean(as_they_come):.3f} | {np.mean(balanced):.4f} (worst {max(balanced):.4f}) "
        f"| {num_samples / seconds:,.0f} samples / CPU-s |"
    )


if __name__ == "__main__":
    print("| max_patches | planning | fill: tokens | fill: patches |\n|---|---|---|---|")
    for bound in (32768, 24576, 20480, 16384):
        measure_packing(bound)
    print("\n| model | dp | microbatches | as they come | balanced | planning and balance |")
    print("|---|---|---|---|---|---|")
    for layout in LAYOUTS:
        measure_balance(*layout)

"""Values that make no sense whatever the others are."""

from collections.abc import Iterator
from math import isfinite
from operator import attrgetter

from triptych.configs.overrides import schema_keys
from triptych.configs.problems import Problem
from triptych.configs.schema import Config

AT_LEAST = {
    1: (
        "model.vision.depth",
        "model.vision.hidden_size",
        "model.vision.num_heads",
        "model.vision.intermediate_size",
        "model.vision.patch_size",
        "model.vision.temporal_patch_size",
        "model.vision.spatial_merge_size",
        "model.language.hidden_size",
        "model.language.num_layers",
        "model.language.num_heads",
        "model.language.num_kv_heads",
        "model.language.head_dim",
        "model.language.intermediate_size",
        "model.language.vocab_size",
        "model.language.max_position_embeddings",
        "stage.token_budget",
        "train.num_steps",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.seq_len",
        "train.validation_packs",
        "train.evaluation_questions",
        "parallel.tp",
        "parallel.pp",
        "parallel.vpp",
        "data.min_pixels",
        "data.max_pixels",
        "data.video.min_frames",
        "data.video.max_frames",
        "data.video.min_pixels",
        "data.video.max_pixels",
        "data.video.max_tokens",
        "data.max_patches",
        "data.image_patches",
        "data.window",
        "data.max_unreadable_in_a_row",
        "data.requests_per_s",
        "cluster.timeout_s",
        "cluster.gpus",
        "cluster.gpus_per_node",
        "run.checkpoint_every",
        "run.keep",
        "log.every",
    ),
    2: ("train.spikes.window",),
    0: (
        "model.vision.window_size",
        "train.validate_every",
        "train.evaluate_every",
        "run.save_every_minutes",
        "run.keep_every",
        "run.weights_every",
        "seed",
        "data.num_workers",
        "data.prefetch_steps",
        "cluster.hang_s",
        "cluster.reserved_gib",
        "cluster.latency_us",
        "optimizer.weight_decay",
        "optimizer.clip_grad",
    ),
}
"""Least value -> the keys it holds for; null is accepted where the schema accepts it."""

AT_MOST = {
    64: ("model.vision.spatial_merge_size", "model.vision.temporal_patch_size"),
    1000: ("data.video.fps",),
    1024: (
        "model.vision.patch_size",
        "train.micro_batch_size",
        "data.num_workers",
        "data.prefetch_steps",
        "cluster.gpus_per_node",
    ),
    4096: (
        "model.vision.depth",
        "model.language.num_layers",
        "model.language.head_dim",
        "parallel.tp",
        "parallel.pp",
        "parallel.vpp",
    ),
    16_384: (
        "model.vision.num_heads",
        "model.language.num_heads",
        "model.language.num_kv_heads",
        "train.validation_packs",
        "train.evaluation_questions",
    ),
    10_000: ("train.spikes.window",),
    65_536: ("train.global_batch_size", "data.video.min_frames", "data.video.max_frames"),
    1_048_576: (
        "data.requests_per_s",
        "model.vision.hidden_size",
        "model.vision.intermediate_size",
        "model.vision.window_size",
        "model.language.hidden_size",
        "model.language.intermediate_size",
        "data.window",
        "cluster.gpus",
    ),
    1_000_000: ("run.save_every_minutes",),
    2_592_000: ("cluster.timeout_s", "cluster.hang_s"),
    16_777_216: (
        "model.language.vocab_size",
        "model.language.max_position_embeddings",
        "train.seq_len",
        "data.video.max_tokens",
    ),
    2**31: (
        "data.min_pixels",
        "data.max_pixels",
        "data.video.min_pixels",
        "data.video.max_pixels",
        "data.max_patches",
        "data.image_patches",
    ),
    10**9: ("data.cache.max_gb",),
    10**15: (
        "data.max_unreadable_in_a_row",
        "stage.token_budget",
        "train.num_steps",
        "train.validate_every",
        "train.evaluate_every",
        "run.checkpoint_every",
        "run.keep",
        "run.keep_every",
        "run.weights_every",
        "log.every",
    ),
}
"""Largest value -> the keys it holds for: ten times what anybody has asked for, and still answered.
Far above, a typing error would end in a traceback, in a full memory, or in hours of planning."""

ABOVE_0 = {
    "data.video.fps": "2.0",
    "data.cache.max_gb": "100.0",
    "train.spikes.sigmas": "6.0",
    "optimizer.eps": "1e-8",
    "cluster.peak_tflops": "989",
    "cluster.efficiency.vit": "1.0",
    "cluster.efficiency.linear": "1.0",
    "cluster.efficiency.attention": "1.0",
    "cluster.efficiency.head": "1.0",
    "cluster.memory_gib": "80",
    "cluster.intra_node_gb_s": "450",
    "cluster.inter_node_gb_s": "50",
    "cluster.link_efficiency": "0.8",
}
"""Keys whose value must be above 0 -> a value that makes sense."""

SEEDS = 2**32
"""Seeds are below this: numpy's and torch's generators all take them."""


def check_bounds(config: Config) -> Iterator[Problem]:
    """Yield a problem for every value that is out of its range."""
    for key in schema_keys():
        value = attrgetter(key)(config)
        if isinstance(value, float) and not isfinite(value):
            yield Problem(f"{key}={value} must be a finite number", f"{key}=NUMBER")
    if config.seed >= SEEDS:
        yield Problem(
            f"seed={config.seed} must be below 2**32 = {SEEDS}", f"seed={config.seed % SEEDS}"
        )
    for least, keys in AT_LEAST.items():
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and value < least:
                yield Problem(f"{key}={value} must be at least {least}", f"{key}={least}")
    for most, keys in AT_MOST.items():
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and value > most:
                yield Problem(f"{key}={value} must be at most {most}", f"{key}={most}")
    for key, default in {"optimizer.beta1": 0.9, "optimizer.beta2": 0.95}.items():
        value = attrgetter(key)(config)
        if not 0 <= value < 1:
            yield Problem(f"{key}={value} must be at least 0 and below 1", f"{key}={default}")
    for key, default in {"data.vision_share": 0.5, "data.max_unreadable": 0.001}.items():
        value = attrgetter(key)(config)
        if not 0 <= value <= 1:
            yield Problem(f"{key}={value} must be from 0 to 1", f"{key}={default}")
    for key, example in ABOVE_0.items():
        value = attrgetter(key)(config)
        if value is not None and value <= 0:
            yield Problem(f"{key}={value} must be above 0", f"{key}={example}")

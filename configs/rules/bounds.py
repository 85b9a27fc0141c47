"""Values that make no sense whatever the others are."""

from collections.abc import Iterator
from operator import attrgetter

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
        "model.vision.in_channels",
        "model.language.hidden_size",
        "model.language.num_layers",
        "model.language.num_heads",
        "model.language.num_kv_heads",
        "model.language.head_dim",
        "model.language.intermediate_size",
        "model.language.vocab_size",
        "stage.token_budget",
        "train.num_steps",
        "train.global_batch_size",
        "train.micro_batch_size",
        "train.seq_len",
        "train.validation_packs",
        "parallel.tp",
        "parallel.pp",
        "data.min_pixels",
        "data.max_pixels",
        "data.max_patches",
        "data.window",
        "data.num_workers",
        "cluster.timeout_s",
        "run.checkpoint_every",
        "run.keep",
        "log.every",
    ),
    0: (
        "train.validate_every",
        "data.prefetch_steps",
        "optimizer.weight_decay",
        "optimizer.clip_grad",
    ),
}
"""Least value -> the keys it holds for; null is accepted where the schema accepts it."""


def check_bounds(config: Config) -> Iterator[Problem]:
    """Yield a problem for every value that is out of its range."""
    for least, keys in AT_LEAST.items():
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and value < least:
                yield Problem(f"{key}={value} must be at least {least}", f"{key}={least}")
    for key, default in {"optimizer.beta1": 0.9, "optimizer.beta2": 0.95}.items():
        value = attrgetter(key)(config)
        if not 0 <= value < 1:
            yield Problem(f"{key}={value} must be at least 0 and below 1", f"{key}={default}")
    if config.optimizer.eps <= 0:
        yield Problem(f"optimizer.eps={config.optimizer.eps} must be above 0", "optimizer.eps=1e-8")

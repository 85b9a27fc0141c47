"""What must hold between the fields of a configuration, checked before any process group starts.

Every rule is arithmetic on the configuration, or asks whether a path exists. Nothing is repaired:
all that is wrong is reported at once, each with the override that mends it.
"""

from collections.abc import Iterator

from triptych.configs.problems import Problem, refusal
from triptych.configs.rules.architecture import check_model
from triptych.configs.rules.bounds import check_bounds
from triptych.configs.rules.cluster import check_cluster, check_measured, check_size
from triptych.configs.rules.datasets import check_data, check_images, check_videos
from triptych.configs.rules.parallel import (
    check_batch,
    check_interleaving,
    check_layout,
    check_overlap,
    check_parallel,
)
from triptych.configs.rules.training import (
    check_hooks,
    check_profile,
    check_recompute,
    check_stage,
    check_start,
)
from triptych.configs.schema import Config


def validate(config: Config, world_size: int) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: what ``load_config`` returned.
        world_size: number of ranks that the run has.
    Raises:
        ConfigError: lists every rule that is broken.
    """
    out_of_range = list(check_bounds(config))
    problems = [
        *out_of_range,
        *check_stage(config),
        *check_start(config),
        *check_data(config),
        *check_hooks(config),
        *check_profile(config),
        *check_recompute(config),
        *check_measured(config),
        *check_size(config, world_size),
    ]
    if not out_of_range:  # the other rules divide by these values
        problems += _check_shapes(config, world_size)
    if problems:
        raise refusal(problems)


def validate_plan(config: Config) -> None:
    """Refuse a configuration that cannot be planned; data and weights need not be there.

    Raises:
        ConfigError: lists every rule that is broken.
    """
    out_of_range = list(check_bounds(config))
    problems = [
        *out_of_range,
        *check_cluster(config),
        *check_measured(config),
        *check_stage(config),
        *check_hooks(config),
        *check_profile(config),
        *check_recompute(config),
    ]
    if not out_of_range:
        model_ranks = config.parallel.tp * config.parallel.pp
        problems += _check_shapes(config, config.cluster.gpus or model_ranks)
    if problems:
        raise refusal(problems)


def _check_shapes(config: Config, world_size: int) -> Iterator[Problem]:
    """What divides what."""
    yield from check_parallel(config, world_size)
    yield from check_interleaving(config)
    yield from check_overlap(config)
    yield from check_layout(config)
    yield from check_batch(config, world_size)
    yield from check_model(config)
    yield from check_images(config)
    yield from check_videos(config)

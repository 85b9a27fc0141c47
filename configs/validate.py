"""What must hold between the fields of a configuration, checked before any process group starts.

Every rule is arithmetic on the configuration, or asks whether a path exists. Nothing is repaired:
all that is wrong is reported at once, each with the override that mends it.
"""

from triptych.configs.problems import refusal
from triptych.configs.rules.bounds import check_bounds
from triptych.configs.rules.data import check_data, check_images
from triptych.configs.rules.model import check_model
from triptych.configs.rules.parallel import check_batch, check_layout, check_parallel
from triptych.configs.rules.training import check_hooks, check_stage, check_start
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
    ]
    if not out_of_range:  # the other rules divide by these values
        problems += [
            *check_parallel(config, world_size),
            *check_layout(config),
            *check_batch(config, world_size),
            *check_model(config),
            *check_images(config),
        ]
    if problems:
        raise refusal(problems)

"""Writes the planned packs of a stage, in their order, to a file that data.order= takes.

python launch/prepare.py export-order --output order.npy --packs 100000 stage=2 data=mine
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from triptych.configs.compose import load_config
from triptych.configs.problems import refusal
from triptych.configs.rules.bounds import check_bounds
from triptych.configs.rules.datasets import check_data
from triptych.data.plan.given_order import export_order
from triptych.errors import ConfigError
from triptych.launch.cli import at_least_one
from triptych.train.data import Mixture


def export(args: Sequence[str]) -> None:
    """Plan, write, and say what is in the file.

    Raises:
        ConfigError: the run's words, or where to write, cannot be used.
        DataError: a dataset is missing or damaged.
    """
    options = parse_args(args)
    if options.output.suffix != ".npy" or not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output} must be FILE.npy in a folder that exists")
    config = load_config(options.words)
    if problems := [*check_bounds(config), *check_data(config)]:
        raise refusal(problems)
    plan = Mixture.open(config, config.data.mixtures[config.stage.name]).plan
    num_packs = export_order(plan, options.output, options.packs)
    names = ", ".join(f"{n} {source.name}" for n, source in enumerate(plan.sources))
    print(
        f"{options.output}: {num_packs:,} packs as rows of pack, source, index; sources: {names}"
        f"\n  -> data.order={options.output} trains on them"
    )


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="prepare.py export-order", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="of launch/pretrain.py")
    parser.add_argument("--output", type=Path, required=True, help="FILE.npy")
    parser.add_argument(
        "--packs", type=at_least_one, required=True, help="at most; fewer where all sources end"
    )
    return parser.parse_intermixed_args(args)

r"""What a run will need and how long it will take, on any laptop: no GPU, no data, no weights.

    python launch/plan.py stage=2 model=qwen2_vl_7b parallel=tp2 cluster=h100 cluster.gpus=64
    python launch/plan.py ... --picture timeline.png   # what each pipeline stage does when
    python launch/plan.py ... --check                  # against a real rank of each kind of stage

Takes the overrides of launch/pretrain.py. See docs/planner.md.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

try:
    from triptych.configs.compose import load_config
    from triptych.configs.validate import validate_plan
    from triptych.costs.estimate import estimate
    from triptych.costs.search import best_layouts
    from triptych.launch.cli import run
    from triptych.launch.planner.estimate_tables import layouts_table, report
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed -> make install && source .venv/bin/activate")

OPTIONS = """\
Options of plan.py:
  --picture FILE    draw what each pipeline stage does when, as PNG, PDF or SVG
  --check           build one rank of each kind of stage without its memory, and compare: slower

"""
NUM_LAYOUTS = 8


def main(argv: Sequence[str]) -> None:
    """Compose, validate, estimate; print."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--check", action="store_true")
    options, words = parser.parse_known_args(argv)
    if {"--help", "-h"} & set(words):
        sys.stdout.write(OPTIONS)
    config = load_config(words)
    validate_plan(config)
    estimated = estimate(config)
    sys.stdout.write(report(estimated) + "\n\n")
    sys.stdout.write(
        layouts_table(best_layouts(config, count=NUM_LAYOUTS), gpus=estimated.gpus) + "\n"
    )
    if options.picture is not None:
        from triptych.launch.planner.timeline_plot import (
            draw_timeline,  # late: matplotlib is slow to load
        )

        sys.stdout.write(f"\n{draw_timeline(estimated, options.picture)}\n")
    if options.check:
        from triptych.launch.planner.check import check  # late: arithmetic does not pay for torch

        sys.stdout.write("\n" + check(estimated) + "\n")


if __name__ == "__main__":
    run(main)

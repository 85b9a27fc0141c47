r"""Show what a step of a run was trained on, and run it again.

    python launch/replay.py runs/mine step=1234          # a picture of each of its packs
    python launch/replay.py runs/mine step=1234 --run    # and the step again, in this process
    torchrun --nproc-per-node 8 launch/replay.py runs/mine step=1234 --run    # as the run did

The packs are those of the run's plan, checked against its ledger. --run goes from the newest
checkpoint before the step, without writing anything but the pictures: it tells the loss of each
sample, the norm of the gradient, and whether both are what metrics.jsonl has. On as many ranks as
the run had they are the same, bit for bit, unless a bit flipped.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from triptych.configs.schema import Config
from triptych.configs.validate import validate
from triptych.errors import ConfigError
from triptych.launch.cli import at_least_zero, run
from triptych.launch.inspection.chosen import read_whole
from triptych.launch.inspection.drawing import draw
from triptych.launch.inspection.segment_view import segment_views
from triptych.launch.inspection.step_of_run import config_of_run, packs_of_step
from triptych.train.console import say
from triptych.train.data import Mixture

PICTURES = "replay"
"""The folder in ``run.dir``."""


def main(argv: Sequence[str]) -> None:
    """Draw, then run.

    Raises:
        ConfigError: it is no run, or cannot run on so many ranks.
        DataError: the run did not make this step, or its data are not what they were.
        CheckpointError: there is no checkpoint to run it from.
    """
    options = _parser().parse_args(argv)
    step = _step(options.step)
    config = config_of_run(options.run_dir)
    config.run.dir = str(options.run_dir)  # it may have been moved
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if options.run:
        from triptych.launch.inspection.run_again import in_one_process, run_again
        from triptych.parallel.mesh import init_distributed, shutdown

        if world_size == 1:
            config = replace(config, parallel=in_one_process(config.parallel))
        validate(config, world_size)
    if int(os.environ.get("RANK", "0")) == 0:
        _draw(options.run_dir, config, step, options.pictures)
    if options.run:
        init_distributed(config.cluster.timeout_s)
        run_again(options.run_dir, config, step)
        shutdown()


def _draw(run_dir: Path, config: Config, step: int, most: int) -> None:
    mixture = Mixture.open(config, config.data.mixtures[config.stage.name])
    packs = packs_of_step(run_dir, step, mixture.plan)
    say(f"step {step}: packs {', '.join(str(pack.number) for pack in packs)}")
    folder = run_dir / PICTURES / f"step_{step:09d}"
    for pack in packs[:most]:
        chosen = read_whole(mixture.sources, pack, config)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"pack_{pack.number:09d}.png"
        draw(segment_views(chosen.batch, config.model, chosen.tokenizer), chosen.titles, file)
        left_out = "".join(
            f"\n  segment {sample.segment} is black, and left out of the loss: {sample.reason}"
            for sample in chosen.unreadable
        )
        say(f"{file}: {'; '.join(chosen.titles)}{left_out}")
    if len(packs) > most:
        say(f"{len(packs) - most} more packs are not drawn  -> --pictures {len(packs)}")


def _step(word: str) -> int:
    key, _, value = word.partition("=")
    if key != "step" or not value.isdecimal() or int(value) == 0:
        raise ConfigError(f"{word} names no step  -> step=1234, from 1 on")
    return int(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("step", metavar="step=N")
    parser.add_argument("--run", action="store_true", help="run the step again")
    parser.add_argument(
        "--pictures",
        type=at_least_zero,
        default=8,
        metavar="N",
        help="packs to draw, at most (default: 8)",
    )
    return parser


if __name__ == "__main__":
    run(main)

r"""Draws samples of a dataset, or a pack of a run, as the model gets them.

    python launch/prepare.py inspect datasets/chats --sample 0,17 model=qwen2_vl_2b \
        data.tokenizer=Qwen2-VL-2B
    python launch/prepare.py inspect --pack 3 stage=2 data=mine

KEY=VALUE are those of launch/pretrain.py: model, tokenizer and limits of resolution decide what is
seen. Without any, the debug model and the tokenizer of the sample data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from triptych.configs.compose import load_config
from triptych.configs.problems import either, refusal
from triptych.configs.rules.bounds import check_bounds
from triptych.configs.rules.datasets import check_data
from triptych.errors import ConfigError
from triptych.launch.inspection.chosen import read_pack, read_samples
from triptych.launch.inspection.drawing import draw
from triptych.launch.inspection.segment_view import segment_views

FORMATS = (".png", ".jpg", ".webp")


def inspect(args: Sequence[str]) -> None:
    """Draw, and say where the picture is.

    Raises:
        ConfigError: what to draw, or the run's words, cannot be used.
        DataError: a dataset is missing or damaged, or has no such sample.
    """
    options = parse_args(args)
    folders = _folders(options.words)
    _check_output(options.output)
    config = load_config([word for word in options.words if "=" in word])
    problems = [*check_bounds(config), *(check_data(config) if options.pack is not None else ())]
    if problems:
        raise refusal(problems)
    if options.pack is None:
        chosen = read_samples(folders[0], options.sample or [0], config)
    else:
        chosen = read_pack(options.pack, config)
    views = segment_views(chosen.batch, config.model, chosen.tokenizer)
    draw(views, chosen.titles, options.output)
    for sample in chosen.unreadable:
        print(f"segment {sample.segment} is black, and left out of a run: {sample.reason}")
    batch = chosen.batch
    print(
        f"{options.output}: {len(views)} samples, {batch.num_tokens} tokens of which "
        f"{batch.num_supervised_tokens} count in the loss, {batch.num_patches} patches"
    )


def _check_output(file: Path) -> None:
    if file.suffix not in FORMATS:
        raise ConfigError(f"--output {file} must end in {either(FORMATS)}")
    if not file.parent.is_dir():
        raise ConfigError(f"--output {file}: {file.parent} is no folder  -> mkdir -p it")


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    """The command line after ``inspect``."""
    parser = argparse.ArgumentParser(
        prog="prepare.py inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="DATASET | KEY=VALUE")
    parser.add_argument(
        "--sample", type=_numbers, metavar="N,N", help="of the dataset, from 0 (default: 0)"
    )
    parser.add_argument("--pack", type=_number, metavar="N", help="of the stage's plan, from 0")
    parser.add_argument(
        "--output", type=Path, default=Path("inspect.png"), help="(default: inspect.png)"
    )
    options = parser.parse_intermixed_args(args)
    if len(_folders(options.words)) != (options.pack is None):
        parser.error("name one dataset folder, or --pack NUMBER and none")
    if options.pack is not None and options.sample:
        parser.error("--pack has the samples of its run; leave --sample out")
    return options


def _folders(words: Sequence[str]) -> list[Path]:
    return [Path(word) for word in words if "=" not in word]


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 0 on")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(word) for word in text.split(",")]

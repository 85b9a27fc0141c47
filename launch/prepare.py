r"""Makes a dataset folder from JSONL, JSON, Parquet, webdataset or IndexedDataset, and media.

    python launch/prepare.py --input chats.jsonl --images photos --tokenizer Qwen2-VL-2B \
        --output datasets/chats

A line is one of

    {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "A cat."}]}
    {"content": PARTS}
    {"text": "plain text"}

where PARTS are [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is it?"}], in
any order and number, or written as ms-swift, LLaVA and others do. docs/data-format.md has more.

    python launch/prepare.py verify datasets/chats datasets/web

reads whole datasets, shards too, and names every file that is not as it was prepared.

    python launch/prepare.py inspect datasets/chats --sample 0,17

draws samples as the model gets them; inspect --help has more.

    python launch/prepare.py export-order --output order.npy --packs 100000 stage=2 data=mine

writes the planned order of packs, for data.order= to take, edited or not.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from triptych.launch.cli import at_least_one, run
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed -> make install && source .venv/bin/activate")

if TYPE_CHECKING:
    from triptych.data.prepare.build_dataset import BuildProgress


REPORT, PICTURE = "report.json", "report.png"
"""What was counted, in the dataset's folder and no part of the dataset."""


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    """The command line; imports nothing heavy."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", type=Path, required=True, help="files with records")
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        help="folders below which every image lies; relative paths start from the first (default: "
        "that of the first JSONL file)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder of a Hugging Face tokenizer with the Qwen2-VL special tokens",
    )
    parser.add_argument("--output", type=Path, required=True, help="dataset folder; must not exist")
    parser.add_argument(
        "--on-bad",
        choices=("fail", "skip"),
        default="fail",
        help="a bad sample ends the program, or is left out whole and listed in quarantine.jsonl "
        "(default: fail)",
    )
    parser.add_argument(
        "--ignore-keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys of records, turns and parts to pass over (default: refused, but for id)",
    )
    parser.add_argument(
        "--allow-spelled-media",
        action="store_true",
        help="text may spell <image>, <video> and the like (default: a bad sample)",
    )
    parser.add_argument(
        "--format",
        choices=(
            "openai",
            "ms-swift",
            "sharegpt",
            "mmc4",
            "obelics",
            "interleaved",
            "pair",
            "triptych",
        ),
        help="how records are written (default: told by the keys of each)",
    )
    parser.add_argument(
        "--parse-grounding",
        action="store_true",
        help="<|box_start|>, <ref> and the like in text become places (default: characters)",
    )
    parser.add_argument(
        "--line-end-is-target",
        action="store_true",
        help="the line end after what the assistant says is learned (default: it is not)",
    )
    parser.add_argument(
        "--shard-mb",
        type=at_least_one,
        default=256,
        help="megabytes of images after which a new shard is begun (default: 256)",
    )
    parser.add_argument(
        "--processes", type=at_least_one, default=1, help="that work at once (default: 1)"
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="prepare the I-th of N shares only, on any machine that sees the folder of --output; "
        "the same command without --part then puts all together",
    )
    parser.add_argument(
        "--block-mb",
        type=at_least_one,
        help="megabytes of input that one process does at a time, and that a kill costs; decides "
        "where shards end (default: 8)",
    )
    return parser.parse_args(args)


def _part(text: str) -> tuple[int, int]:
    """Such as 3/64."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"{text} must be I/N with 1 <= I <= N, as 3/64")
    return int(number), int(total)


def _reading(options: argparse.Namespace) -> dict[str, object]:
    """The options that decide what is read, for the report."""
    names = ("format", "parse_grounding", "line_end_is_target", "ignore_keys")
    return {name: getattr(options, name) for name in (*names, "allow_spelled_media")}


def main(args: Sequence[str]) -> None:
    """Prepares, and prints what was made; or verifies, draws, or writes an order."""
    # What follows is imported late: --help does not pay for torch.
    if args[:1] == ["inspect"]:
        from triptych.launch.inspection.command import inspect

        return inspect(args[1:])
    if args[:1] == ["verify"]:
        from triptych.launch.inspection.verify_datasets import verify

        return verify(args[1:])
    if args[:1] == ["export-order"]:
        from triptych.launch.inspection.export_order import export

        return export(args[1:])
    options = parse_args(args)
    from triptych.data.dataset.dataset import Dataset
    from triptych.data.prepare.build_block import OnBad, ReadingOptions
    from triptych.data.prepare.build_dataset import BLOCK_SIZE, build_dataset
    from triptych.data.prepare.foreign import Allowed
    from triptych.data.tokenizer import load_tokenizer
    from triptych.launch.inspection.overview import draw_overview

    progress = ProgressLine()
    manifest = build_dataset(
        options.input,
        options.output,
        load_tokenizer(options.tokenizer),
        images=options.images or [options.input[0].parent],
        on_bad=OnBad[options.on_bad],
        reading=ReadingOptions(
            Allowed(frozenset(options.ignore_keys), options.allow_spelled_media),
            options.format,
            options.parse_grounding,
            options.line_end_is_target,
        ),
        shard_size=options.shard_mb * 1_000_000,
        block_size=options.block_mb * 1_000_000 if options.block_mb else BLOCK_SIZE,
        num_processes=options.processes,
        part=options.part,
        report=progress,
    )
    progress.end()
    if manifest is None:
        print(
            f"part {options.part[0]} of {options.part[1]} is there: {progress.num_samples} "
            "samples  -> when all are, the same command without --part puts them together"
        )
        return
    print(
        f"{options.output}: {manifest.num_samples} samples, "
        f"{manifest.num_media} images and videos, "
        f"{manifest.num_tokens} text tokens of which {manifest.num_targets} are targets; "
        f"{manifest.num_skipped} bad samples left out"
    )
    print("\n".join(progress.last.tally.lines()))
    if options.parse_grounding:
        print("  read places that text spells out (--parse-grounding)")
    report = {"reading": _reading(options), **progress.last.tally.content()}
    (options.output / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    draw_overview(Dataset.open(options.output, options.output.name), options.output / PICTURE)


class ProgressLine:
    """A bar over the bytes of input, with the rate and the time left."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.num_samples = 0  # a part may have no block of the input
        self._bar = tqdm(
            total=100.0,
            unit="%",
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
            disable=False,
            delay=1.0,
        )

    def __call__(self, progress: "BuildProgress") -> None:
        """Called after every sample or block."""
        self.last, self.num_samples = progress, progress.num_samples
        num_read = progress.num_samples + progress.num_skipped
        rate = num_read / max(progress.elapsed_s, 1e-9)
        self._bar.set_postfix_str(
            f"{progress.num_samples} samples, {rate:.0f}/s, {progress.num_skipped} bad",
            refresh=False,
        )
        self._bar.update(100 * progress.done - self._bar.n)

    def end(self) -> None:
        """The bar goes."""
        self._bar.close()


if __name__ == "__main__":
    run(main)

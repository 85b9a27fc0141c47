r"""Let a trained model read an image or a video, or answer about text alone.

    python launch/sample.py --checkpoint runs/demo/stage3 --tokenizer runs/demo/data/tokenizer \
        --image scan.png --prompt "Read the digits."    # --video FILE: a video; neither: text alone
    python launch/sample.py --checkpoint runs/demo/stage3 --tokenizer runs/demo/data/tokenizer \
        --digits 400 --output runs/demo    # composed from handwritten digits kept out of training
    torchrun --nproc-per-node 8 launch/sample.py --tp 4 --pp 2 ...    # a model larger than a GPU

Answers are greedy; one to a question is written as it comes. One process holds the whole model, on
the GPU where there is one; or --tp times --pp processes do, and what torchrun starts beyond that
shares out the pictures of --digits.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from triptych.launch.bar import Bar
    from triptych.launch.cli import at_least_one, long_import, run
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed -> make install && source .venv/bin/activate")


def main(argv: Sequence[str]) -> None:
    """Answer one question, or read the digits that are kept for evaluation."""
    parser = _parser()
    options = parser.parse_args(argv)
    file = options.image or options.video
    if file is not None and options.prompt is None:
        parser.error("--image and --video need --prompt TEXT")
    if (options.digits is None) == (options.prompt is None):
        parser.error(
            "give either --prompt TEXT, alone or with --image FILE or --video FILE, or --digits "
            "NUMBER"
        )
    if options.digits is not None and options.output is None:
        parser.error("--digits needs --output FOLDER")
    with long_import():  # late: --help does not pay for torch
        from triptych.data.types import MediaKind
        from triptych.launch.inference.answering import Answerer, Question

    layout = {"tp": options.tp, "pp": options.pp}
    answerer = Answerer.load(options.checkpoint, options.tokenizer, **layout)
    is_main = answerer.mesh.is_main
    if options.prompt is not None:
        kind = MediaKind.VIDEO if options.video else MediaKind.IMAGE
        question = Question(file and file.read_bytes(), options.prompt, str(file), kind)
        write = _write if is_main else _be_silent
        answerer.stream(question, max_new_tokens=options.max_new_tokens, write=write)
        write("\n")
        return
    from triptych.launch.digits import evaluate, plots

    tell = Bar("answers").show if is_main else _be_silent
    readings = evaluate.evaluate(answerer, options.digits, seed=options.seed, tell=tell)
    if not is_main:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    print(evaluate.table(readings))
    evaluate.save_readings(readings, options.output)
    print(plots.contact_sheet(readings, options.output, seed=options.seed))
    if options.curves:
        print(plots.loss_curves(options.curves, options.output))


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _be_silent(*_: object) -> None:
    """What the other ranks say."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or checkpoint")
    parser.add_argument("--tokenizer", type=Path, required=True, help="Hugging Face folder")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--image", type=Path, help="file to ask about")
    shown.add_argument("--video", type=Path, help="file to ask about")
    parser.add_argument("--prompt", help="the question")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, help="an answer is cut there (default: 32)"
    )
    for degree, what in (("--tp", "share each layer"), ("--pp", "share the layers")):
        parser.add_argument(
            degree, type=at_least_one, default=1, help=f"ranks that {what} (default: 1)"
        )
    parser.add_argument("--digits", type=int, metavar="NUMBER", help="images for evaluation")
    parser.add_argument("--seed", type=int, default=1234, help="of these images (default: 1234)")
    parser.add_argument("--output", type=Path, help="folder for results and pictures")
    parser.add_argument(
        "--curves", nargs="+", type=Path, metavar="RUN", help="also draw the loss of these runs"
    )
    return parser


if __name__ == "__main__":
    run(main)

"""Three stages on handwritten digits, on a CPU, in minutes; then the model reads unseen ones.

    make demo                       # or: python launch/demo.py
    python launch/demo.py --miniature --output runs/miniature    # two minutes, no bars

Training, reading and export are commands that are printed before they run: type them by hand.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from triptych.errors import TriptychError
    from triptych.launch.cli import run
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed -> make install && source .venv/bin/activate")

if TYPE_CHECKING:
    from triptych.launch.digits.evaluate import Scores

ROOT = Path(__file__).parents[1]
SEED = 1234
NUM_RANKS = 2
MARK = "demo.json"
"""Says that a folder is a demo's, and may be replaced by the next one."""


class DemoError(TriptychError):
    """A step failed; its own message stands above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """What the demo must reach: shares of pictures read exactly."""

    accuracy: float
    each: float
    """Pictures of one digit, and of two digits."""
    controls: float
    """Blank, and swapped, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSizes:
    """The sizes of a demo."""

    num_images: int
    num_samples: int
    """Of each dataset."""
    budgets: tuple[int, int, int, int]
    """Tokens of warm-up, stage 1, 2 and 3."""
    num_read: int
    num_exported: int
    """Pictures that transformers reads, too."""
    bars: Bars


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One call of launch/pretrain.py."""

    name: str
    stage: str
    what: str
    token_budget: int
    overrides: str


FULL = DemoSizes(
    num_images=30_000,
    num_samples=30_000,
    budgets=(400_000, 750_000, 1_000_000, 800_000),
    num_read=400,
    num_exported=50,
    bars=Bars(accuracy=0.85, each=0.75, controls=0.15),
)
MINIATURE = DemoSizes(
    num_images=400,
    num_samples=400,
    budgets=(20_000, 20_000, 20_000, 20_000),
    num_read=40,
    num_exported=10,
    bars=Bars(accuracy=0.0, each=0.0, controls=1.0),
)


def runs_of(sizes: DemoSizes) -> list[Run]:
    """Warm-up and three stages, each in another layout. Learning rates were found by trial."""
    warmup, first, second, third = sizes.budgets
    return [
        Run(
            name="warmup",
            stage="warmup",
            what="a small language model learns phrases, and to copy, from text (DP=2)",
            token_budget=warmup,
            overrides="train.micro_batch_size=2",
        ),
        Run(
            name="stage1",
            stage="1",
            what="the ViT learns single digits; the language model is frozen (PP=2)",
            token_budget=first,
            overrides="parallel=pp2 parallel.layout=[1,2] "
            "stage.vit.lr=1.5e-3 stage.adapter.lr=1.5e-3",
        ),
        Run(
            name="stage2",
            stage="2",
            what="everything learns strings of digits (TP=2, sequence parallel)",
            token_budget=second,
            overrides="parallel=tp2 train.micro_batch_size=4",
        ),
        Run(
            name="stage3",
            stage="3",
            what="language model and adapter learn to answer; the ViT is frozen (DP=2, ZeRO-1)",
            token_budget=third,
            overrides="train.micro_batch_size=2 stage.adapter.lr=5e-4 stage.llm.lr=5e-4",
        ),
    ]


def main(argv: Sequence[str]) -> None:
    """Make data, train, read, export, compare; fail below the bars."""
    options = _parser().parse_args(argv)
    sizes = MINIATURE if options.miniature else FULL
    folder: Path = options.output
    started = time.monotonic()
    _begin(folder, sizes)
    runs = runs_of(sizes)
    _train(folder, runs)
    _read(folder, sizes, runs)
    seconds = time.monotonic() - started
    _export(folder, runs)
    print(f"in all {time.monotonic() - started:.0f} s, {_cpu_seconds():.0f} CPU-seconds")
    _judge(folder, sizes, seconds)


def _begin(folder: Path, sizes: DemoSizes) -> None:
    """Take the folder, in place of what an earlier demo left there, and make the data.

    Raises:
        DemoError: the folder holds something else.
    """
    if folder.exists():
        if not (folder / MARK).is_file():
            raise DemoError(f"{folder} exists and is no demo's  -> --output FOLDER, another one")
        print(f"{folder}: what an earlier demo left is removed")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).write_text(json.dumps(asdict(sizes), indent=1) + "\n")
    _announce(
        f"data: {sizes.num_images} pictures of scanned digits, and what is said about them; "
        "a thousand take two seconds"
    )
    from triptych.data.digits.make import make_digits  # late: --help does not pay for torch

    counts = {"num_images": sizes.num_images, "num_samples": sizes.num_samples}
    make_digits(folder / "data", **counts, seed=SEED, num_processes=NUM_RANKS)


def _train(folder: Path, runs: Sequence[Run]) -> None:
    """Warm-up and three stages, each from the checkpoint of the one before."""
    start = "init.allow_random=true"
    for run in runs:
        _announce(f"{run.name}: {run.what}")
        _call(
            f"torchrun --standalone --nproc-per-node {NUM_RANKS} launch/pretrain.py "
            f"stage={run.stage} model=demo data=digits data.root={folder}/data "
            f"run.dir={folder}/{run.name} {start} stage.token_budget={run.token_budget} "
            f"{run.overrides}",
        )
        start = f"init.checkpoint={folder}/{run.name}"


def _read(folder: Path, sizes: DemoSizes, runs: Sequence[Run]) -> None:
    """The last checkpoint reads pictures of scans and sizes that training never showed."""
    _announce(f"reading {sizes.num_read} unseen pictures")
    curves = " ".join(f"{folder}/{run.name}" for run in runs)
    _call(
        f"python launch/sample.py --checkpoint {folder}/{runs[-1].name} "
        f"--tokenizer {folder}/data/tokenizer --digits {sizes.num_read} --seed {SEED} "
        f"--output {folder} --curves {curves}"
    )


def _export(folder: Path, runs: Sequence[Run]) -> None:
    """The last checkpoint as a Hugging Face folder."""
    _announce("export for transformers")
    _call(
        f"python launch/convert.py export {folder}/{runs[-1].name} {folder}/export "
        f"--tokenizer {folder}/data/tokenizer"
    )


def _judge(folder: Path, sizes: DemoSizes, seconds: float) -> None:
    """Compare with transformers, print the last line, and say what is below the bars.

    Raises:
        DemoError: something is.
    """
    from triptych.launch.digits import evaluate
    from triptych.launch.digits.transformers_check import transformers_answers

    readings = evaluate.load_readings(folder)
    checked = readings[: sizes.num_exported]
    answers = transformers_answers(folder / "export", len(checked), seed=SEED)
    same = sum(r.answer_ids == ids for r, ids in zip(checked, answers, strict=True))
    print(f"transformers reads {same} of {len(checked)} pictures as we do")
    scores = evaluate.score(readings)
    problems = below(sizes.bars, scores)
    if same < len(checked):
        problems.append(f"transformers answers {len(checked) - same} pictures otherwise")
    if problems:
        print("the demo failed:\n  " + "\n  ".join(problems))
    print(f"demo: {scores.line()} seconds={seconds:.0f}")
    if problems:
        sys.exit(1)


def below(bars: Bars, scores: "Scores") -> list[str]:
    """What does not reach the bars."""
    least = {"accuracy": bars.accuracy, "one_digit": bars.each, "two_digits": bars.each}
    problems = [
        f"{name}={getattr(scores, name):.3f} is below {bar}"
        for name, bar in least.items()
        if getattr(scores, name) < bar
    ]
    return problems + [
        f"{name}={getattr(scores, name):.3f} is above {bars.controls}: answers do not come "
        "from the picture"
        for name in ("blank", "swapped")
        if getattr(scores, name) > bars.controls
    ]


def _announce(what: str) -> None:
    print(f"\n== {what}", flush=True)


def _call(command: str) -> None:
    """Run a command of this project, as a person would type it in its folder.

    SIGTERM and Ctrl-C end the command, too; torchrun passes it on to its ranks.

    Raises:
        DemoError: it failed.
    """
    print(f"$ {command}", flush=True)
    program, *words = shlex.split(command)
    threads = "1" if program == "torchrun" else "2"
    with subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": threads},
    ) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            process.wait()
        finally:
            process.terminate()  # after Ctrl-C; of one that has ended, nothing
            signal.signal(signal.SIGTERM, before)
    if process.returncode != 0:
        raise DemoError(f"failed with exit code {process.returncode}: {command}")


def _cpu_seconds() -> float:
    """User and system time of this process and of all that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)"
    )
    parser.add_argument("--miniature", action="store_true", help="far less of everything")
    return parser


if __name__ == "__main__":
    run(main)

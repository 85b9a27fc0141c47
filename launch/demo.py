"""Three stages on handwritten digits, on a CPU, in minutes; then the model reads unseen ones.

    make demo                       # or: python launch/demo.py
    python launch/demo.py --miniature --output runs/miniature    # two minutes, nothing to reach

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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

try:
    from triptych.data.end_with_parent import end_with_parent
    from triptych.errors import TriptychError
    from triptych.launch.bar import Bar
    from triptych.launch.cli import run
    from triptych.launch.digits.recipe import FULL, MINIATURE, DemoSizes, Run, below, runs_of
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed -> make install && source .venv/bin/activate")

ROOT = Path(__file__).parents[1]
NUM_RANKS = 2
MARK = "demo.json"
"""Says that a folder is a demo's, and may be replaced by the next one."""


class DemoError(TriptychError):
    """A step failed; its own message stands above."""


def main(argv: Sequence[str]) -> None:
    """Make data, train, read, export, compare; fail below the bars."""
    options = _parser().parse_args(argv)
    sizes = MINIATURE if options.miniature else FULL
    folder: Path = options.output
    started = time.monotonic()
    _begin(folder, sizes, options.seed)
    runs = runs_of(sizes)
    _train(folder, runs, options.seed)
    _export(folder, runs)
    answers = _read(folder, sizes, runs, options.seed)
    _announce("the report of all four")
    _call(f"python launch/report.py {folder} --output {folder}/report.html")
    seconds = time.monotonic() - started
    print(f"in all {seconds:.0f} s, {_cpu_seconds():.0f} CPU-seconds")
    _judge(folder, sizes, answers, seconds)


def _begin(folder: Path, sizes: DemoSizes, seed: int) -> None:
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
    _announce(f"data: {sizes.num_images} pictures of scanned digits, and what is said about them")
    from triptych.data.digits.make import make_digits  # late: --help does not pay for torch

    make_digits(
        folder / "data",
        num_images=sizes.num_images,
        num_samples=sizes.num_samples,
        seed=seed,
        num_processes=NUM_RANKS,
        tell=Bar("pictures and samples").show,
    )


def _train(folder: Path, runs: Sequence[Run], seed: int) -> None:
    """Warm-up and three stages, each from the checkpoint of the one before."""
    start = "init.allow_random=true"
    for run in runs:
        _announce(f"{run.name}: {run.what}")
        _call(
            f"torchrun --standalone --nproc-per-node {NUM_RANKS} launch/pretrain.py "
            f"stage={run.stage} model=demo data=digits data.root={folder}/data "
            f"run.dir={folder}/{run.name} {start} stage.token_budget={run.token_budget} "
            f"seed={seed} {run.overrides}",
        )
        start = f"init.checkpoint={folder}/{run.name}"


def _read(
    folder: Path, sizes: DemoSizes, runs: Sequence[Run], seed: int
) -> Sequence[Sequence[int]]:
    """The last checkpoint reads pictures of scans and sizes that training never showed.

    Beside it, ``transformers`` reads the first of them from the export: its answers are returned.
    """
    _announce(f"reading {sizes.num_read} unseen pictures; {sizes.num_exported} by transformers too")
    curves = " ".join(f"{folder}/{run.name}" for run in runs)
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent) as beside:
        asked = beside.submit(_transformers_answers, folder / "export", sizes.num_exported, seed)
        _call(
            f"python launch/sample.py --checkpoint {folder}/{runs[-1].name} "
            f"--tokenizer {folder}/data/tokenizer --digits {sizes.num_read} --seed {seed} "
            f"--output {folder} --curves {curves}"
        )
        return asked.result()


def _transformers_answers(export: Path, num_images: int, seed: int) -> list[list[int]]:
    """Runs in a process of its own, on the core that the reading leaves."""
    import torch

    from triptych.launch.digits.transformers_check import transformers_answers

    torch.set_num_threads(1)
    return transformers_answers(export, num_images, seed=seed)


def _export(folder: Path, runs: Sequence[Run]) -> None:
    """The last checkpoint as a Hugging Face folder."""
    _announce("export for transformers")
    _call(
        f"python launch/convert.py export {folder}/{runs[-1].name} {folder}/export "
        f"--tokenizer {folder}/data/tokenizer"
    )


def _judge(
    folder: Path, sizes: DemoSizes, answers: Sequence[Sequence[int]], seconds: float
) -> None:
    """Compare with transformers, print the last line, and say what is below the bars.

    Raises:
        DemoError: something is.
    """
    from triptych.launch.digits import evaluate

    readings = evaluate.load_readings(folder)
    checked = readings[: sizes.num_exported]
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
    with subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    parser.add_argument(
        "--seed", type=int, default=1234, help="of data, weights and order (default: 1234)"
    )
    return parser


if __name__ == "__main__":
    run(main)

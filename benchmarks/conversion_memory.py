r"""Memory and time of import, export and verify, by commands, on random weights.

    python benchmarks/conversion_memory.py --folder /tmp/weights model=qwen2_vl_7b \
        model.language.num_layers=2 model.vision.depth=2

Memory is what a rank has for itself (RssAnon): pages of mapped files are the system's. The base is
that of the same command on a model whose largest tensor has 1 MB. The folder is removed afterwards.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import psutil
import torch

from triptych.checkpoints.hf.folder_writer import HFWriter
from triptych.checkpoints.hf.name_table import name_table
from triptych.checkpoints.hf.origin import Origin
from triptych.configs.compose import load_config
from triptych.configs.model_schema import ModelConfig
from triptych.data.tokenizer import train_tokenizer
from triptych.data.types import PixelLimits

CONVERT = str(Path(__file__).parents[1] / "launch" / "convert.py")
EVERY_S = 0.005
MB = 1e6


def main(argv: Sequence[str]) -> None:
    """Measure the small model, then the one that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="new; for all that is written")
    parser.add_argument("--import-ranks", type=int, default=2)
    parser.add_argument("--export-ranks", type=int, default=4)
    parser.add_argument("words", nargs="+", help="model=..., model.language...=...")
    options = parser.parse_args(argv)
    small = ["model=debug", "model.language.vocab_size=4096"]
    for words in (small, options.words):
        config = load_config([*words, "init.allow_random=true"])
        options.folder.mkdir(parents=True)
        try:
            measure(config.model, options)
        finally:
            shutil.rmtree(options.folder)


def measure(model: ModelConfig, options: argparse.Namespace) -> None:
    """Print a table: the peak of each command, and its time."""
    hub, tokenizer, out = (options.folder / name for name in ("hub", "tokenizer", "out"))
    tokens = train_tokenizer(["x"], tokenizer, 280).tokens
    model = replace(model, tokens=tokens)
    largest = write_random(model, hub, tokenizer)
    print(f"{model.name}: largest tensor {largest / MB:,.0f} MB in bf16", flush=True)
    run = str(options.folder / "run")
    commands = {
        "import": (options.import_ranks, [str(hub), run]),
        "export": (options.export_ranks, [run, str(out), "--tokenizer", str(tokenizer)]),
        "verify": (1, [str(out), run, "--tensors-only"]),
    }
    for name, (num_ranks, words) in commands.items():
        peak, wall_s = peak_of(num_ranks, [CONVERT, name, *words])
        print(f"  {name} by {num_ranks}: {peak / MB:,.0f} MB a rank at most, {wall_s:.0f} s")


def write_random(model: ModelConfig, hub: Path, tokenizer: Path) -> int:
    """A folder of random weights in bf16; returns the bytes of its largest tensor."""
    writer = HFWriter(hub, model, torch.bfloat16)
    for name, shape in writer.shapes.items():
        writer.add(name, torch.randn(shape, dtype=torch.bfloat16))
    writer.finish(tokenizer, Origin(limits=PixelLimits(784, 28224), stage="imported"))
    shapes = [shape for entry in name_table(model).values() for shape in entry.theirs.values()]
    return max(map(prod, shapes)) * torch.bfloat16.itemsize


def peak_of(num_ranks: int, words: list[str]) -> tuple[int, float]:
    """Largest RssAnon that any rank had, in bytes, and the seconds that the command took."""
    launcher = [sys.executable]
    if num_ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        launcher = [*torchrun, "--standalone", "--nproc-per-node", str(num_ranks)]
    started, peak = time.monotonic(), 0
    with subprocess.Popen([*launcher, *words], stdout=subprocess.DEVNULL) as command:
        process = psutil.Process(command.pid)
        while command.poll() is None:
            peak = max([peak, *map(anonymous_bytes, [process, *children(process)])])
            time.sleep(EVERY_S)
    assert command.returncode == 0, words
    return peak, time.monotonic() - started


def children(process: psutil.Process) -> list[psutil.Process]:
    """Of all generations; none where it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def anonymous_bytes(process: psutil.Process) -> int:
    """What the process has for itself; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main(sys.argv[1:])

r"""Memory and time of import, export and verify, by commands, on random weights.

    python benchmarks/conversion_memory.py --folder /tmp model=qwen2_vl_7b \
        model.language.num_layers=6 model.vision.depth=2 --tp 2 --pp 2

With --tp or --pp, what was imported is saved again by the ranks of that layout, and that is
exported. Both ends are verified: what came in, and what goes out, are bit-equal to the checkpoint.

Memory is what each rank has for itself (RssAnon): pages of mapped files are the system's. The base
is that of the same command on a model whose largest tensor has 1 MB. What is written is removed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import psutil
import torch

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.checkpoints.hf.folder_writer import HFWriter
from triptych.checkpoints.hf.name_table import name_table
from triptych.checkpoints.hf.origin import Origin
from triptych.configs.compose import load_config
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import DataConfig
from triptych.data.tokenizer import train_tokenizer
from triptych.data.types import PixelLimits

CONVERT = str(Path(__file__).parents[1] / "launch" / "convert.py")
SAVED_BY_LAYOUT = str(Path(__file__).with_name("saved_by_layout.py"))
EVERY_S = 0.005
MB = 1e6


def main(argv: Sequence[str]) -> None:
    """Measure the small model, then the one that is asked for."""
    parser = parser_with_folder(__doc__ or "")
    parser.add_argument("--import-ranks", type=int, default=2)
    parser.add_argument("--export-ranks", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1, help="of the ranks that save in between")
    parser.add_argument("--pp", type=int, default=1, help="of the ranks that save in between")
    parser.add_argument("words", nargs="+", help="model=..., model.language...=...")
    options = parser.parse_intermixed_args(argv)
    small = ["model=debug", "model.language.vocab_size=4096"]
    for words in (small, options.words):
        config = load_config([*words, "init.allow_random=true"])
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measure(config.model, Path(folder), options)


def measure(model: ModelConfig, folder: Path, options: argparse.Namespace) -> None:
    """Print a table: what each rank of each command had at most, and the command's time."""
    hub, tokenizer, out = (folder / name for name in ("hub", "tokenizer", "out"))
    tokens = train_tokenizer(["x"], tokenizer, 280).tokens
    model = replace(model, tokens=tokens)
    largest = write_random(model, hub, tokenizer)
    print(f"{model.name}: largest tensor {largest / MB:,.0f} MB in bf16", flush=True)
    imported = run = folder / "imported"
    commands = [("import", options.import_ranks, [CONVERT, "import", hub, imported])]
    if options.tp * options.pp > 1:
        run = folder / "run"
        layout = ["--tp", options.tp, "--pp", options.pp]
        words = [SAVED_BY_LAYOUT, *layout, imported, run, tokenizer]
        commands.append(
            (f"save as tp {options.tp} x pp {options.pp}", options.tp * options.pp, words)
        )
    words = [CONVERT, "export", run, out, "--tokenizer", tokenizer]
    commands.append(("export", options.export_ranks, words))
    for name, hf in {"what was imported": hub, "what was exported": out}.items():
        commands.append((f"verify {name}", 1, [CONVERT, "verify", hf, run, "--tensors-only"]))
    for name, num_ranks, words in commands:
        peaks, wall_s = peaks_of(num_ranks, list(map(str, words)))
        each = ", ".join(f"{peak / MB:,.0f}" for peak in peaks)
        print(f"  {name}, ranks 0 to {num_ranks - 1}: {each} MB; {wall_s:.0f} s", flush=True)


def write_random(model: ModelConfig, hub: Path, tokenizer: Path) -> int:
    """A folder of random weights in bf16; returns the bytes of its largest tensor."""
    writer = HFWriter(hub, model, torch.bfloat16)
    for name, shape in writer.shapes.items():
        writer.add(name, torch.randn(shape, dtype=torch.bfloat16))
    writer.finish(tokenizer, Origin(limits=PixelLimits.of(DataConfig()), stage="imported"))
    shapes = [shape for entry in name_table(model).values() for shape in entry.theirs.values()]
    return max(map(prod, shapes)) * torch.bfloat16.itemsize


def peaks_of(num_ranks: int, words: list[str]) -> tuple[list[int], float]:
    """Largest RssAnon that each rank had, in bytes, and the seconds that the command took."""
    launcher = [sys.executable]
    if num_ranks > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        launcher = [*torchrun, "--standalone", "--nproc-per-node", str(num_ranks)]
    started, peaks = time.monotonic(), [0] * num_ranks
    with subprocess.Popen([*launcher, *words], stdout=subprocess.DEVNULL) as command:
        process = psutil.Process(command.pid)
        while command.poll() is None:
            for each in [process] if num_ranks == 1 else children(process):
                rank = rank_of(each)
                peaks[rank] = max(peaks[rank], anonymous_bytes(each))
            time.sleep(EVERY_S)
    assert command.returncode == 0, words
    return peaks, time.monotonic() - started


def rank_of(process: psutil.Process) -> int:
    """As torchrun tells it; 0 where nothing does."""
    try:
        return int(process.environ().get("RANK", "0"))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


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

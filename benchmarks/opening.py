"""What opening a large dataset costs: the first time, and in every process after that.

    python benchmarks/opening.py 10000000        # samples; 1.2 GB of disk for 10^7

The dataset has one picture per sample, of random size, and no content.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from triptych.configs.model_schema import TokensConfig, VisionConfig
from triptych.configs.schema import Oversize
from triptych.data.dataset.dataset import SIZES, Dataset
from triptych.data.dataset.dataset_manifest import DatasetManifest, write_manifest
from triptych.data.dataset.media_index import ROW
from triptych.data.dataset.text_file import TextWriter
from triptych.data.hashed_files import HashedFile
from triptych.data.plan.order import Plan
from triptych.data.plan.passes import remember_in
from triptych.data.plan.plan_sources import plan_sources
from triptych.data.types import PixelLimits

LIMITS = PixelLimits(56 * 56, 16384 * 28 * 28)
TOKENS_PER_SAMPLE = 4
CHUNK = 1 << 20


def main() -> None:
    """Make the dataset, open it in two processes one after the other, print a row for each."""
    if sys.argv[1] == "open":
        open_in_this_process(Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), int(sys.argv[1]))
        print(
            "| opened | CPU-seconds | own memory, MB | mapped, MB | plan |\n|---|---|---|---|---|"
        )
        for name in ("first", "again"):
            command = [sys.executable, __file__, "open", folder]
            print(f"| {name} | {subprocess.check_output(command, text=True).strip()} |", flush=True)


def make(folder: Path, num_samples: int) -> None:
    """A dataset folder of so many samples, of the size of its files but with little in them."""
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir()
    writer = TextWriter(folder / "text")
    ids = np.zeros(TOKENS_PER_SAMPLE, dtype=np.int32)
    for _ in range(num_samples):
        writer.append(ids)
    writer.close()
    with (folder / "loss.bin").open("wb") as loss:
        loss.truncate(TOKENS_PER_SAMPLE * num_samples)
    with (folder / "media.idx").open("wb") as index:
        for start in range(0, num_samples, CHUNK):
            rows = np.zeros(min(CHUNK, num_samples - start), dtype=ROW)
            rows["sample"] = np.arange(start, start + len(rows))
            for side in ("width", "height"):
                rows[side] = rng.integers(100, 2000, len(rows))
            index.write(rows.tobytes())
    names = ("text.bin", "text.idx", "loss.bin", "media.idx")
    manifest = DatasetManifest(
        tokenizer="",
        tokens=TokensConfig(),
        num_samples=num_samples,
        num_tokens=TOKENS_PER_SAMPLE * num_samples,
        num_targets=0,
        num_media=num_samples,
        num_skipped=0,
        files={
            name: HashedFile(size=(folder / name).stat().st_size, xxh3_128="") for name in names
        },
    )
    write_manifest(manifest, folder)


def open_in_this_process(folder: Path) -> None:
    """Open and plan as a run does, and print what it took."""
    begin, before = time.process_time(), memory_mb("RssAnon")
    source = Dataset.open(folder, "large")
    plan = Plan(
        plan_sources([source], {"large": 1.0}, LIMITS, VisionConfig()),
        seed=0,
        seq_len=2048,
        max_patches=8192,
        window=4096,
        oversize=Oversize.skip,
        remember=remember_in([folder / SIZES]),
    )
    seconds = time.process_time() - begin
    own, mapped = memory_mb("RssAnon") - before, memory_mb("RssFile")
    print(f"{seconds:.2f} | {own:.0f} | {mapped:.0f} | {plan.hash[:8]}")


def memory_mb(kind: str) -> float:
    """Resident memory of this process, in 10^6 bytes; a line of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024 / 1e6


if __name__ == "__main__":
    main()

"""Our reading against webdataset's, of the same shards.

    python benchmarks/reading.py --folder /tmp

Caption pairs with a JPEG of 448x448 each, prepared there and removed. Prints samples per
CPU-second, ours and webdataset's in short turns, many rounds in each of several fresh processes:
where buffers happen to lie in a process makes either side up to 15 % faster for as long as it
lives, so one process's ratio is chance. glibc keeps what either frees: it would hand some of it
back after each image, in the main thread alone, at 800 page faults and a third of the time.

    files               ours by offset and size, in random order, hashes checked; webdataset's
                        members of its tar stream
    files and text      ours with ids, targets and index, each checked; webdataset's JSON parsed
    files to patches    both decoded, resized and cut in the same way
    all to batches      ours by the loader's reader: with text, positions and collating, of which
                        webdataset's side has nothing
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import webdataset
from tqdm import tqdm

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.benchmarks.noisy_picture import picture
from triptych.configs.model_schema import LanguageConfig, ModelConfig
from triptych.configs.schema import DataConfig
from triptych.data.dataset.dataset import SHARDS, Dataset
from triptych.data.loading.reader import BatchFormat, Reader
from triptych.data.media.image import cut_patches
from triptych.data.media.kinds import kind_of
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import train_tokenizer
from triptych.data.types import Media, MediaKind, Pack, PixelLimits, SampleId

NUM_SAMPLES, SIDE, SAMPLES_PER_PACK = 200, 448, 8
PROCESSES, ROUNDS = 12, 5
LIMITS = PixelLimits.of(DataConfig())


def prepare(folder: Path) -> tuple[Path, ModelConfig]:
    """The dataset's folder, and the parts of a model that reading asks for."""
    rng = np.random.default_rng(0)
    for number in range(20):
        picture(rng, SIDE, SIDE).save(folder / f"{number}.jpg", quality=90)
    lines = folder / "pairs.jsonl"
    pairs = [{"image": f"{i % 20}.jpg", "text": f"picture {i}"} for i in range(NUM_SAMPLES)]
    lines.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokenizer = train_tokenizer(["picture 1 2 3"], folder / "tokenizer", 300)
    build_dataset([lines], folder / "set", tokenizer, images=[folder])
    language = LanguageConfig(vocab_size=tokenizer.vocab_size)
    return folder / "set", ModelConfig(tokens=tokenizer.tokens, language=language)


def samples_per_cpu_s(read_all: Callable[[], int]) -> float:
    """Of one pass over all samples."""
    before = time.process_time()
    num_samples = read_all()
    assert num_samples == NUM_SAMPLES
    return num_samples / (time.process_time() - before)


def arms(dataset: Dataset, model: ModelConfig) -> dict[str, tuple[Callable[[], int], ...]]:
    """Work -> ours and webdataset's."""
    order = np.random.default_rng(1).permutation(NUM_SAMPLES).tolist()
    shards = [str(path) for path in sorted((dataset.path / SHARDS).iterdir())]
    form = BatchFormat(model=model, limits=LIMITS, pad_to=1, read_pixels=True, pin_memory=False)
    kind, num_tokens = kind_of(MediaKind.IMAGE), dataset.sizes(LIMITS, model.vision).num_tokens
    packs: list[Pack] = []
    for at in range(0, NUM_SAMPLES, SAMPLES_PER_PACK):
        chosen = order[at : at + SAMPLES_PER_PACK]
        samples = tuple(SampleId(0, index) for index in chosen)
        packs.append(Pack(len(packs), samples, int(num_tokens[chosen].sum()), 0))

    media = [item for index in order for item in dataset.sample(index).media]

    def ours_files() -> int:
        return sum(bool(dataset.read_media(item)) for item in media)

    def theirs_files() -> int:
        return sum(bool(item["jpg"]) for item in stream())

    def ours_read() -> int:
        read = 0
        for index in order:
            sample = dataset.sample(index)
            read += all(dataset.read_media(media) for media in sample.media)
        return read

    def stream() -> webdataset.WebDataset:
        return webdataset.WebDataset(shards, shardshuffle=False)

    def theirs_read() -> int:
        return sum(bool(item["jpg"] and json.loads(item["json"])) for item in stream())

    def ours_batches() -> int:
        reader = Reader([dataset], form, num_workers=1)
        read = sum(len(reader.read([[pack]]).microbatches[0].sample_ids) for pack in packs)
        reader.close()
        return read

    def patches_of(data: bytes) -> int:
        item = Media(MediaKind.IMAGE, 0, 0, len(data), b"", SIDE, SIDE, 1, 0)
        frames = kind.frames(data, item, kind.shape(item, LIMITS, model.vision), "")
        return len(cut_patches(frames, model.vision))

    def ours_patches() -> int:
        return sum(patches_of(dataset.read_media(item)) > 0 for item in media)

    def theirs_patches() -> int:
        return sum(patches_of(item["jpg"]) > 0 for item in stream())

    return {
        "files": (ours_files, theirs_files),
        "files and text": (ours_read, theirs_read),
        "files to patches": (ours_patches, theirs_patches),
        "all to batches": (ours_batches, theirs_patches),
    }


def measure(folder: Path, model: ModelConfig) -> dict[str, list[list[float]]]:
    """Work -> (ROUNDS, 2) samples per CPU-second, ours and webdataset's, of one fresh process."""
    gc.freeze()  # as a run does: a collection looks through all of torch
    rates = {}
    for work, both in arms(Dataset.open(folder, "pairs"), model).items():
        rates[work] = [[samples_per_cpu_s(arm) for arm in both] for _ in range(ROUNDS + 1)][1:]
    return rates


def main() -> None:
    """Measure, and print a line for each work."""
    options = parser_with_folder(__doc__ or "").parse_args()
    os.environ.update(MALLOC_TRIM_THRESHOLD_=str(2**28), MALLOC_MMAP_THRESHOLD_=str(2**25))
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh_process,
    ):
        folder, model = prepare(Path(name))
        arguments = [folder] * PROCESSES, [model] * PROCESSES
        measured = list(tqdm(fresh_process.map(measure, *arguments), total=PROCESSES))
    for work in measured[0]:
        rounds = [both for rates in measured for both in rates[work]]
        ours, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = sorted(
            statistics.median(mine / other for mine, other in rates[work]) for rates in measured
        )
        print(
            f"{work}: ours {ours:,.0f}, webdataset {theirs:,.0f} samples per CPU-second; "
            f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()

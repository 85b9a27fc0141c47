"""What each part of reading keeps of the interpreter's lock, and so of a training thread.

    python benchmarks/interpreter_lock.py --folder /tmp

While another thread reads samples to collated batches, or does one part of that again and again,
this one computes in pure Python, which needs the lock all the time. When it neither runs nor waits
for a core, by the kernel's own count, it waits for that lock. Prints the CPU time of each part per
picture, how long it keeps the lock, and what share that is: medians of rounds in which all parts
take turns, and the least and the most. The last two are known, and show what the measuring
itself adds. A thread that has to leave its core keeps the lock meanwhile: let nothing else run.
"""

import gc
import hashlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image
from tqdm import tqdm

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.benchmarks.reading import LIMITS, NUM_SAMPLES, SAMPLES_PER_PACK, arms, prepare
from triptych.benchmarks.table import spread
from triptych.data.dataset.dataset import Dataset
from triptych.data.loading.collate import Segment, collate
from triptych.data.media.image import cut_patches, decode_image, image_frames
from triptych.data.media.kinds import kind_of
from triptych.data.tokens import expand
from triptych.data.types import SampleId

ROUNDS = 5
SWITCH_S = 1e-4
"""How soon a thread gets the lock that another wants to keep: a part waits for it many times."""
SMALLER = (392, 392)


def waited_and_worked_ms(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds per picture: this thread's waiting for the lock, and the others' CPU time."""
    worker = threading.Thread(target=work)
    started, cpu_s = time.monotonic(), time.process_time()
    own_s, queued_s = time.thread_time(), _waited_for_a_core_s()
    worker.start()
    while worker.is_alive():
        sum(range(1000))
    own_s, queued_s = time.thread_time() - own_s, _waited_for_a_core_s() - queued_s
    waited_s = time.monotonic() - started - own_s - queued_s
    worked_s = time.process_time() - cpu_s - own_s
    return 1000 * waited_s / NUM_SAMPLES, 1000 * worked_s / NUM_SAMPLES


def _waited_for_a_core_s() -> float:
    """This thread, so far, while it could have run."""
    _, waited_ns, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return int(waited_ns) / 1e9


def works(folder: Path) -> dict[str, Callable[[], object]]:
    """On as many pictures as the dataset has samples."""
    path, model = prepare(folder)
    dataset, vision = Dataset.open(path, "pairs"), model.vision
    read_all, _ = arms(dataset, model)["all to batches"]
    sample = dataset.sample(0)
    [media] = sample.media
    grid = np.array([kind_of(media.kind).grid(media, LIMITS, vision)])
    data = dataset.read_media(media)
    image = decode_image(data, "")
    frames = image_frames(image, (image.height, image.width))
    ids, targets = expand(sample, grid, model)
    segment = Segment(SampleId(0, 0), ids, targets, grid, (cut_patches(frames, vision),))
    pack, megabyte = [segment] * SAMPLES_PER_PACK, bytes(1 << 20)

    def for_each(part: Callable[[int], object], every: int = 1) -> Callable[[], None]:
        def work() -> None:
            for number in range(0, NUM_SAMPLES, every):
                part(number)

        return work

    return {
        "all of it": read_all,
        "text read": for_each(dataset.sample),
        "placeholders repeated": for_each(lambda _: expand(sample, grid, model)),
        "file read": for_each(lambda _: dataset.read_span(media, media.size)),
        "file hashed": for_each(lambda _: xxhash.xxh3_128_digest(data)),
        "decoded": for_each(lambda _: decode_image(data, "")),
        "resized": for_each(lambda _: image.resize(SMALLER, Image.Resampling.BICUBIC)),
        "colours laid apart": for_each(lambda _: image_frames(image, frames.shape[2:])),
        "patches cut": for_each(lambda _: cut_patches(frames, vision)),
        "collated": for_each(
            lambda _: collate(pack, model, pad_to=1, with_pixels=True), SAMPLES_PER_PACK
        ),
        "known: Python alone": for_each(lambda _: sum(range(50_000))),
        "known: without the lock": for_each(lambda _: hashlib.sha256(megabyte)),
    }


def main() -> None:
    """Measure, and print a line for each."""
    options = parser_with_folder(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        parts = works(Path(name))
        gc.freeze()
        sys.setswitchinterval(SWITCH_S)
        rounds = [
            {what: waited_and_worked_ms(work) for what, work in parts.items()}
            for _ in tqdm(range(ROUNDS + 1))
        ][1:]
    print("| part | CPU-ms a picture | keeps the lock, ms | share |\n|---|---|---|---|")
    for what in parts:
        waited, worked = zip(*(each[what] for each in rounds), strict=True)
        share = statistics.median(waited) / statistics.median(worked)
        print(f"| {what} | {statistics.median(worked):.3f} | {spread(waited, 3)} | {share:.0%} |")


if __name__ == "__main__":
    main()

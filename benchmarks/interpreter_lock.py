"""What reading in threads costs a training thread.

    python benchmarks/interpreter_lock.py --folder /tmp

While other threads read samples to collated batches, as in a run, or do a part of that, this one
computes in pure Python, which needs the interpreter's lock all the time. When it neither runs nor
waits for a core, by the kernel's own count, it waits for that lock. Prints this per picture, beside
the CPU time that the work takes: the median of some rounds, and the least and the most.
"""

import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from triptych.benchmarks.given_folder import parser_with_folder
from triptych.benchmarks.reading import NUM_SAMPLES, arms, prepare
from triptych.data.media.image import cut_patches, decode_image, image_frames

ROUNDS = 5


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
    dataset, model = prepare(folder)
    read_all, _ = arms(dataset, model)["all to batches"]
    data = dataset.read_media(dataset.sample(0).media[0])
    image = decode_image(data, "")
    frames = image_frames(image, (392, 392))

    def repeated(part: Callable[[], object]) -> Callable[[], object]:
        def work() -> None:
            for _ in range(NUM_SAMPLES):
                part()

        return work

    return {
        "all of reading": read_all,
        "decoding": repeated(lambda: decode_image(data, "")),
        "resizing": repeated(lambda: image_frames(image, (392, 392))),
        "cutting": repeated(lambda: cut_patches(frames, model.vision)),
    }


def main() -> None:
    """Measure, and print a line for each."""
    options = parser_with_folder(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        parts = works(Path(name))
        gc.freeze()
        for what, work in parts.items():
            rounds = [waited_and_worked_ms(work) for _ in range(ROUNDS + 1)][1:]
            waited, worked = (sorted(column) for column in zip(*rounds, strict=True))
            print(
                f"{what}: {statistics.median(worked):.2f} CPU-ms, holds the lock for "
                f"{statistics.median(waited):.2f} ms ({waited[0]:.2f} to {waited[-1]:.2f})"
            )


if __name__ == "__main__":
    main()

"""What a limit on requests per second costs: ``python benchmarks/oss_requests.py``.

Two processes of 16 threads read a shard in small ranges, through the real client, from a server on
the loopback that refuses more than 150 requests in any second. Their own limit is set to a share of
that. Prints what failed, requests per object, and the share of the allowed rate that was used.
"""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier

from triptych.data.stores.media_store import open_store
from triptych.errors import TriptychError
from triptych.tests.helpers.oss_server import environment, serving

PROCESSES, THREADS, OBJECTS = 2, 16, 3000
LIMIT, SHARE = 150, 0.95


def read(number: int) -> int:
    """In a process of its own; returns how many reads failed."""
    store = open_store("oss://bucket", LIMIT * SHARE)

    def one(i: int) -> int:
        try:
            return int(store.read("000000.tar", i, 1000) != bytes(1000))
        except TriptychError:
            return 1

    with ThreadPoolExecutor(THREADS) as threads:
        return sum(threads.map(one, range(number)))


def warm_up(all_ready: Barrier) -> None:
    """In each process: imports are not measured, whichever of them is slow."""
    read(1)
    all_ready.wait()


def main() -> None:
    """Measure, and print one line."""
    with serving() as server:
        server.objects["bucket/000000.tar"] = bytes(100_000)
        server.per_second = LIMIT
        os.environ |= environment(server.endpoint)
        context = multiprocessing.get_context("spawn")
        all_ready = context.Barrier(PROCESSES + 1)
        with context.Pool(PROCESSES, warm_up, (all_ready,)) as pool:
            all_ready.wait()
            server.asked.clear()
            started, cpu_s = time.monotonic(), time.process_time()
            failed = sum(pool.map(read, [OBJECTS // PROCESSES] * PROCESSES, chunksize=1))
            seconds = time.monotonic() - started
        print(
            f"limit {LIMIT}/s: {OBJECTS} reads in {seconds:.1f} s, {failed} failed, "
            f"{len(server.asked) / OBJECTS:.3f} requests per object, "
            f"{OBJECTS / seconds / LIMIT:.1%} of the allowed rate; "
            f"server {time.process_time() - cpu_s:.1f} CPU-seconds"
        )


if __name__ == "__main__":
    main()

"""The pool of ranks: results come back, failures are told apart, a broken pool starts again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.pool import RankFailureError, RankPool
from triptych.tests.helpers.processes import is_alive, wait_until_dead

pytestmark = pytest.mark.distributed
Pool = Callable[[int], RankPool]


@dataclass
class Scaled:
    factor: int


def sum_of_ranks(scaled: Scaled) -> tuple[int, Scaled]:
    value = torch.tensor(scaled.factor * (dist.get_rank() + 1))
    dist.all_reduce(value)
    return int(value), scaled


def pid() -> int:
    return os.getpid()


def random_tensor() -> torch.Tensor:
    return torch.randn(3)


def count_threads_after_new_groups() -> int:
    for _ in range(5):
        dist.all_reduce(torch.ones(1), group=dist.new_group())
    return len(os.listdir("/proc/self/task"))


def build_layout(tp: int, pp: int) -> tuple[int, int]:
    from triptych.parallel.mesh import build_mesh

    mesh = build_mesh(tp, pp, seed=1, timeout_s=HANG_S)
    value = torch.ones(1)
    dist.all_reduce(value, group=mesh.dp_group)
    return mesh.tp_rank + 10 * mesh.pp_rank, int(value)


def fail_on(rank: int, how: str) -> None:
    print(f"rank {dist.get_rank()} is about to {how}")
    dist.barrier()  # all have said so
    if dist.get_rank() == rank:
        match how:
            case "raise":
                raise ValueError("three is not a power of two")
            case "exit":
                os._exit(7)
            case "be killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "abort":
                os.abort()
            case "return a lambda":
                return lambda: None
    dist.barrier()


def fail_everywhere() -> None:
    raise ValueError(f"told by {dist.get_rank()}")


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(10**6)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(pool: Pool, world_size: int):
    total = 3 * sum(range(1, world_size + 1))
    assert pool(world_size).run(sum_of_ranks, scaled=Scaled(3)) == [(total, Scaled(3))] * world_size


def test_processes_are_kept_between_cases(pool: Pool):
    pids = pool(2).run(pid)
    assert len(set(pids)) == 2
    assert pool(2).run(pid) == pids


def test_random_numbers_do_not_depend_on_earlier_cases(pool: Pool):
    first = pool(2).run(random_tensor)
    second = pool(2).run(random_tensor)
    assert torch.equal(first[0], second[1])


def test_groups_are_gone_after_a_case(pool: Pool):
    threads = [max(pool(2).run(count_threads_after_new_groups)) for _ in range(4)]
    assert threads[-1] <= threads[1]


def test_megatron_layouts_follow_each_other(pool: Pool):
    assert pool(4).run(build_layout, tp=2, pp=1) == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert pool(4).run(build_layout, tp=2, pp=2) == [(0, 1), (1, 1), (10, 1), (11, 1)]
    assert pool(4).run(build_layout, tp=1, pp=1) == [(0, 4)] * 4


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", "rank 1 raised\nTraceback[^-]*ValueError: three is not a power of two"),
        ("return a lambda", "rank 1 raised\nTraceback[^-]*pickle"),
        ("exit", "rank 1 died, exit code 7"),
        ("be killed", f"rank 1 died, exit code -{signal.SIGKILL.value}"),
        ("abort", "rank 1 died, exit code -6\nFatal Python error: Aborted[^-]*in fail_on"),
    ],
)
def test_failure_of_one_rank_is_told_soon(pool: Pool, how: str, expected: str):
    pids = pool(2).run(pid)
    with pytest.raises(
        RankFailureError, match=rf"(?s)test_pool.py::fail_on failed on rank .*{expected}"
    ) as failure:
        pool(2).run(fail_on, rank=1, how=how)
    assert f"--- rank 0 printed\nrank 0 is about to {how}" in str(failure.value)
    assert not any(is_alive(one) for one in pids)
    assert set(pool(2).run(pid)).isdisjoint(pids)


def test_rank_that_waits_for_a_failed_one_shows_where(pool: Pool):
    with pytest.raises(
        RankFailureError, match=r"(?s)rank 0 was still here.*in barrier.*in fail_on"
    ):
        pool(2).run(fail_on, rank=1, how="raise")


def test_every_failed_rank_is_told(pool: Pool):
    with pytest.raises(RankFailureError) as failure:
        pool(2).run(fail_everywhere, grace_s=HANG_S)
    assert "told by 0" in str(failure.value)
    assert "told by 1" in str(failure.value)


def test_hang_ends_at_the_timeout_and_shows_every_stack(pool: Pool):
    for timeout_s in (0.5, 5, 50, 500):  # a busy machine needs longer until both hang
        pool(2).run(pid)
        with pytest.raises(
            RankFailureError, match=rf"did not finish within {timeout_s} s"
        ) as failure:
            pool(2).run(sleep_on, rank=1, timeout_s=timeout_s)
        waiting, sleeping = str(failure.value).split("--- rank 1 was still here")
        if "in sleep_on" in waiting and "in sleep_on" in sleeping:
            break
    assert "in barrier" in waiting
    assert "in sleep_on" in sleeping
    assert "in barrier" not in sleeping


def test_process_that_forgets_to_stop_its_pool_still_ends(tmp_path: Path):
    """As when pytest itself breaks down: waiting for ranks at exit would hang for ever."""
    script = tmp_path / "without_stop.py"
    script.write_text(
        "import os, pathlib\n"
        "from triptych.tests.helpers import pool\n"
        "if __name__ == '__main__':\n"
        f"    folder = pathlib.Path({str(tmp_path / 'pool')!r})\n"
        "    print(pool.RankPool(1, folder, preload='torch.distributed').run(os.getpid))\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    assert not is_alive(int(ended.stdout.strip("[]\n")))


def test_failure_in_one_pool_leaves_the_others_alone(pool: Pool):
    pids = pool(1).run(pid)
    with pytest.raises(RankFailureError):
        pool(2).run(fail_everywhere)
    assert pool(1).run(pid) == pids


def test_rank_that_died_between_cases_is_told(pool: Pool):
    pids = pool(2).run(pid)
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(RankFailureError, match="rank 0 died"):
        pool(2).run(pid)
    assert len(pool(2).run(pid)) == 2


def test_function_that_ranks_cannot_find_is_refused(pool: Pool):
    with pytest.raises(TypeError, match="must stand at the top level"):
        pool(1).run(lambda: None)


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path):
    """A pytest that is killed while its ranks are in a collective leaves none of them behind."""
    script = tmp_path / "killed_in_a_case.py"
    script.write_text(
        "import os, pathlib, signal, threading, time\n"
        "import torch.distributed as dist\n"
        "from triptych.tests.helpers import pool\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def hang():\n"
        "    (folder / f'pid{dist.get_rank()}').write_text(str(os.getpid()))\n"
        "    time.sleep(10**6) if dist.get_rank() else dist.barrier()\n"
        "def kill_when_ranks_hang():\n"
        "    while not all((folder / f'pid{i}').exists() for i in range(2)):\n"
        "        time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=kill_when_ranks_hang).start()\n"
        "    without_megatron = 'torch.distributed'\n"
        "    pool.RankPool(2, folder / 'pool', without_megatron).run(hang)\n"
    )
    ended = subprocess.run([sys.executable, str(script)], check=False)
    assert ended.returncode == -signal.SIGKILL
    wait_until_dead(int((tmp_path / f"pid{rank}").read_text()) for rank in range(2))

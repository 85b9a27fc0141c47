"""The gloo groups of a rank share the thread that waits for their sockets, and nothing else."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.limits import HANG_S

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does"),
]


def num_threads_for_sockets() -> int:
    names = [Path("/proc/self/task", thread, "comm") for thread in os.listdir("/proc/self/task")]
    return sum(name.read_text() == "gloo_tcp_loop\n" for name in names)


def sums_in_each_group() -> tuple[int, set[float]]:
    mesh = build_mesh(2, 1, seed=0, timeout_s=HANG_S)
    sums = set()
    for group in (mesh.tp_group, mesh.model_group, dist.group.WORLD):
        one = torch.ones(())
        dist.all_reduce(one, group=group)
        sums.add(one.item())
    return num_threads_for_sockets(), sums


def test_one_thread_for_all_groups(pool):
    assert pool(2).run(sums_in_each_group) == [(1, {2.0})] * 2


def timeouts() -> list[timedelta]:
    mesh = build_mesh(2, 1, seed=0, timeout_s=20 * 60)
    other = dist.new_group(timeout=timedelta(minutes=30))
    backends = [group._get_backend(torch.device("cpu")) for group in (mesh.tp_group, other)]
    return [backend.options._timeout for backend in backends]


def test_each_group_has_its_own_timeout(pool):
    assert pool(2).run(timeouts) == [[timedelta(minutes=20), timedelta(minutes=30)]] * 2

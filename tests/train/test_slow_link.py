"""Four ranks in four network namespaces, one with a slow cable: the network is told, and where."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from triptych.tests.helpers.runs import Runs
from triptych.train.events import read_events

pytestmark = pytest.mark.slow
NUM_RANKS, SLOW = 4, 3
RATE = "8mbit"
"""Of the slow cable, in both directions; the others have none to speak of."""
TRAIN = """
from triptych.train.hooks import slow_ranks
slow_ranks.WINDOW_STEPS = 4
from triptych.launch import pretrain
from triptych.launch.cli import run
run(pretrain.main)
"""


def missing() -> str | None:
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if absent := [command for command in ("ip", "tc", "unshare") if not shutil.which(command)]:
        return f"needs {', '.join(absent)} (Debian: iproute2, util-linux)"
    limit = "ip link set lo up && tc qdisc add dev lo root tbf rate 8mbit burst 16kb latency 1s"
    probe = subprocess.run(
        ["unshare", "--net", "sh", "-c", limit], capture_output=True, text=True, check=False
    )
    return f"needs tbf in a network namespace: {probe.stderr}" if probe.returncode else None


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of namespaces with addresses 10.77.0.1 and so on, on one switch."""
    if reason := missing():
        pytest.skip(reason)
    names = [f"triptych{os.getpid()}r{rank}" for rank in range(NUM_RANKS)]
    switch = f"triptych{os.getpid()}switch"
    made = []
    try:
        for name in (switch, *names):
            ip("netns", "add", name)
            made.append(name)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for rank, name in enumerate(names):
            port = f"p{rank}"
            ip(
                "link",
                "add",
                "eth0",
                "netns",
                name,
                *f"type veth peer {port} netns {switch}".split(),
            )
            ip("-n", switch, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        for namespace, device in ((names[SLOW], "eth0"), (switch, f"p{SLOW}")):
            limit = f"qdisc add dev {device} root tbf rate {RATE} burst 16kb latency 10s"
            subprocess.run(["tc", "-n", namespace, *limit.split()], check=True)
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def test_a_slow_link_is_told_as_the_network_of_its_rank(machines, digits, tmp_path):
    """The dp pairs are of two stages; of the pp pairs, 0 and 2, 1 and 3, the second is slow."""
    runs = Runs(None, digits, tmp_path)
    words = runs.words("run", "pp2", "train.num_steps=24", "run.checkpoint_every=1000")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "eth0",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": "29500",  # of a namespace of its own
        "WORLD_SIZE": str(NUM_RANKS),
    }
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", TRAIN, *words],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, name in enumerate(machines)
    ]
    said = [process.communicate()[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * NUM_RANKS, said
    slow = [event for event in read_events(runs.dir("run")) if event["what"] == "straggler"]
    print(*slow, sep="\n")
    links = [event["ranks"] for event in slow if event["cause"] == "network"]
    assert links
    assert all(ends == [SLOW - 2, SLOW] for ends in links)

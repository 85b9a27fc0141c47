"""A node is lost at a known place in a save: the others leave, and the next start loses nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from triptych.checkpoints.layout import step_folders
from triptych.checkpoints.manifest import verify
from triptych.configs.schema import Config
from triptych.parallel.agree import SingleProcess
from triptych.tests.helpers.known_place import PLACES_IN_A_SAVE, kill_all, once_at
from triptych.tests.helpers.pool import RankFailureError
from triptych.tests.helpers.processes import wait_until_dead
from triptych.tests.helpers.runs import Runs, packs, train, without_times
from triptych.train.events import read_events
from triptych.train.restarts import read_starts

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LAYOUT = "tp2 pp2"
WORDS = ("run.checkpoint_every=2", "run.keep=1", "train.num_steps=6")
NUM_NODES, RANKS_PER_NODE = 2, 2
NODE_IS_KILLED = """
import json, os, time
from pathlib import Path
import psutil
from triptych.launch import pretrain
from triptych.launch.cli import run
from triptych.tests.helpers.known_place import PLACES_IN_A_SAVE, kill_all, once_at

place, node, folder = json.loads(os.environ["LOSES"])

def kill_the_node():
    while not (agents := Path(folder, "agents")).exists():
        time.sleep(0.01)
    agent = psutil.Process(json.loads(agents.read_text())[node])
    found = [agent.pid, *(child.pid for child in agent.children(recursive=True))]
    Path(folder, "killed").write_text(json.dumps(found))
    kill_all(found)

if os.environ["RANK"] == "0":
    once_at(PLACES_IN_A_SAVE[place], kill_the_node)
run(pretrain.main)
"""


@pytest.fixture(scope="module")
def whole(pool, digits, tmp_path_factory) -> Path:
    """The run that nobody kills."""
    runs = Runs(pool, digits, tmp_path_factory.mktemp("whole"))
    runs.train("whole", LAYOUT, *WORDS)
    return runs.dir("whole")


def test_the_ranks_of_a_node_are_killed_while_others_write_their_shards(whole, runs):
    """The pool ends the others: a rank that fails stays there, and keeps its connections."""
    lost = {"place": "while shards are written", "node": 1}
    with pytest.raises(RankFailureError) as failed:
        runs.call(train_and_lose, "run", LAYOUT, *WORDS, **lost)
    for rank in (2, 3):
        assert f"rank {rank} died, exit code -9" in str(failed.value)
    runs.train("run", LAYOUT, *WORDS)
    check_as_uninterrupted(runs.dir("run"), whole, resumed_from=2)


def train_and_lose(config: Config, place: str, node: int) -> None:
    """Train; the ranks of a node die."""
    found: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(found, os.getpid())
    if dist.get_rank() == 0:
        lost = found[node * RANKS_PER_NODE :][:RANKS_PER_NODE]
        once_at(PLACES_IN_A_SAVE[place], lambda: kill_all(lost))
    train(config)


@pytest.mark.torchrun
@pytest.mark.parametrize("node", range(NUM_NODES))
@pytest.mark.parametrize("place", PLACES_IN_A_SAVE)
def test_a_node_is_killed_and_the_next_start_goes_on_from_the_newest_checkpoint(
    place, node, whole, runs, tmp_path
):
    """With its torchrun. Where all have written and rank 0 lives, it still commits."""
    codes = lose_a_node(place, node, runs.words("run", LAYOUT, *WORDS), tmp_path)
    assert codes[node] == -signal.SIGKILL
    assert codes[1 - node] == 1, "it leaves by itself"
    runs.train("run", LAYOUT, *WORDS)
    is_committed = place == "after COMMIT" or (place == "before COMMIT" and node == 1)
    check_as_uninterrupted(runs.dir("run"), whole, resumed_from=4 if is_committed else 2)


def check_as_uninterrupted(run_dir: Path, whole: Path, resumed_from: int) -> None:
    """Each step and pack once, all checkpoints good, and nothing beside them."""
    died, finished = read_starts(read_events(run_dir))
    assert (died.end, finished.end) == ("died", "finished")
    assert finished.step == resumed_from
    assert without_times(run_dir) == without_times(whole)
    assert packs(run_dir) == packs(whole)
    root = run_dir / "checkpoints"
    saved = step_folders(root)
    assert {path for path in root.iterdir() if path.is_dir()} == set(saved), "leftovers"
    assert not [folder for folder in saved if verify(folder, SingleProcess())]


def lose_a_node(place: str, node: int, words: Sequence[str], folder: Path) -> list[int]:
    """Exit codes of a torchrun for each node, which meet at node 0."""
    script = folder / "node_is_killed.py"
    script.write_text(NODE_IS_KILLED)
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["LOSES"] = json.dumps([place, node, str(folder)])
    with socket.socket() as reserved:  # bound, but not listened at: nobody else is given this port
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        agents = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={NUM_NODES}"),
                    *(f"--nproc-per-node={RANKS_PER_NODE}", "--rdzv-backend=c10d"),
                    *(f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={number == 0}"),
                    *(script, *words),
                ],
                env=os.environ | environment,
            )
            for number in range(NUM_NODES)
        ]
        (folder / "agents").write_text(json.dumps([agent.pid for agent in agents]))
        codes = [agent.wait() for agent in agents]
    wait_until_dead(json.loads((folder / "killed").read_text()))
    return codes

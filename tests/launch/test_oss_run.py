"""A whole run of launch/pretrain.py whose shards lie in OSS."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.tests.helpers.oss_server import REGION, environment, serving
from triptych.tests.helpers.runs import STAGE2, Runs, losses

PRETRAIN = str(Path(__file__).parents[2] / "launch" / "pretrain.py")


@pytest.mark.slow
@pytest.mark.torchrun
def test_a_run_reads_its_shards_from_object_storage(pool, digits, tmp_path):
    """On two ranks; the losses are those of the shards in the folder, which are not there."""
    root = tmp_path / "data"
    shutil.copytree(digits, root)
    runs = Runs(pool, root, tmp_path)
    words = ("train.num_steps=3", "data.generate=false")
    runs.train("local", "dp2", *words)
    with serving() as server:
        for name in STAGE2:
            for shard in (root / name / "shards").iterdir():
                server.objects[f"bucket/{name}/{shard.name}"] = shard.read_bytes()
            shutil.rmtree(root / name / "shards")
        places = [f"data.sources.{name}.shards=oss://bucket/{name}" for name in STAGE2]
        variables = {
            **os.environ,
            **environment(server.endpoint),
            "OSS_REGION": REGION,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node=2", PRETRAIN, *runs.words("oss", "dp2", *words)]
        subprocess.run([*command, *places], env=variables, check=True)
        assert server.asked
    assert losses(runs.dir("oss")) == losses(runs.dir("local"))

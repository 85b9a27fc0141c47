"""Random states go on where a checkpoint's ranks and devices are those of the run."""

import pytest
import torch
from safetensors.torch import save_file

from triptych.checkpoints.layout import CheckpointFolder
from triptych.checkpoints.run_state import load_random_state
from triptych.parallel.device import HAS_CUDA
from triptych.tests.helpers.single import alone


@pytest.mark.skipif(HAS_CUDA, reason="devices of the run are those of a CPU here")
@pytest.mark.parametrize(
    ("num_ranks", "kinds", "goes_on"),
    [(1, ["cpu"], True), (2, ["cpu"], False), (1, ["cpu", "cuda"], False)],
)
def test_states_of_other_ranks_or_devices_change_nothing(num_ranks, kinds, goes_on, tmp_path):
    checkpoint = CheckpointFolder(tmp_path / "checkpoint")
    checkpoint.make()
    saved = torch.Generator().manual_seed(7).get_state()
    for rank in range(num_ranks):
        save_file({kind: saved.clone() for kind in kinds}, checkpoint.random_state(rank))
    with torch.random.fork_rng(), alone() as mesh:
        before = torch.get_rng_state()
        assert load_random_state(checkpoint.path, mesh) is goes_on
        assert torch.get_rng_state().equal(saved if goes_on else before)

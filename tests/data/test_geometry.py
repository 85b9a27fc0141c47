"""A model whose patches are not those of Qwen2-VL trains, and alike in any layout."""

import pytest

from triptych.tests.helpers.runs import Runs, losses, metrics

pytestmark = pytest.mark.distributed

PATCHES_OF_16 = (
    "model.vision.patch_size=16",
    "model.vision.spatial_merge_size=1",
    "model.vision.temporal_patch_size=1",
)


def test_a_model_of_other_patches_trains_in_any_layout(pool, digits, tmp_path):
    runs = Runs(pool, digits, tmp_path)
    for layout in ("single", "tp2 pp2"):
        runs.train(layout, layout, *PATCHES_OF_16, "train.num_steps=2")
    assert losses(runs.dir("tp2 pp2")) == pytest.approx(losses(runs.dir("single")), rel=1e-6)
    assert metrics(runs.dir("single"))[0]["num_patches"] > 0

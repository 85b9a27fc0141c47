"""``model.json`` comes back as it was written; what an older one lacks is what models were then."""

import json
from dataclasses import asdict, replace

import pytest

from triptych.checkpoints.model_file import differences, read_model, write_model
from triptych.configs.model_schema import VisionMLP, VisionNorm
from triptych.errors import CheckpointError
from triptych.tests.helpers.reference import TOWERS, small_model

MODEL = small_model(heads=4, kv_heads=2, tied=False)


def write_old(folder, **vision) -> None:
    """As it was before a tower was described: with channels, without norm and MLP."""
    content = asdict(MODEL)
    del content["vision"]["norm"], content["vision"]["mlp"]
    content["vision"] |= {"in_channels": 3} | vision
    (folder / "model.json").write_text(json.dumps(content))


@pytest.mark.parametrize("tower", TOWERS)
def test_comes_back_as_it_was_written(tower, tmp_path):
    model = small_model(heads=4, kv_heads=2, tied=True, tower=tower)
    write_model(tmp_path / "model.json", model)
    assert read_model(tmp_path) == model
    assert differences(tmp_path, model) == []


def test_an_older_file_is_read(tmp_path):
    write_old(tmp_path)
    assert read_model(tmp_path) == MODEL
    assert differences(tmp_path, MODEL) == []


@pytest.mark.parametrize(
    "vision", [{"in_channels": 4}, {"mlp": "relu"}, {"norm": "batchnorm"}, {"experts": 8}]
)
def test_what_this_project_does_not_have_is_refused(vision, tmp_path):
    write_old(tmp_path, **vision)
    with pytest.raises(CheckpointError, match=r"model\.json does not describe a model"):
        read_model(tmp_path)


def test_another_tower_is_a_difference(tmp_path):
    write_model(tmp_path / "model.json", MODEL)
    gated = replace(MODEL.vision, norm=VisionNorm.rmsnorm, mlp=VisionMLP.swiglu)
    assert differences(tmp_path, replace(MODEL, vision=gated)) == [
        "model.vision.norm=rmsnorm, the checkpoint has layernorm",
        "model.vision.mlp=swiglu, the checkpoint has quick_gelu",
    ]

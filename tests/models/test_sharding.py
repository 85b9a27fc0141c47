"""How tp shards each parameter: a table that names all of them, once, and guesses nothing."""

import pytest
import torch

from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import TensorSharding, full_shape, shard, unshard
from triptych.tests.helpers.reference import small_model

MODELS = {"untied": small_model(heads=4, kv_heads=2, tied=False)}


@pytest.mark.parametrize("sharding", TensorSharding)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_shards_of_a_tensor_make_it_up(sharding: TensorSharding, tp: int) -> None:
    full = torch.arange(16.0 * 8).view(16, 8)
    shards = [shard(full, sharding, rank, tp) for rank in range(tp)]
    assert torch.equal(unshard(shards, sharding), full)
    assert {full_shape(one, sharding, tp) for one in shards} == {full.shape}


@pytest.mark.parametrize(
    "name",
    [
        "vision.decoder.layers.0.mlp.linear_fc3.weight",
        "language.decoder.layers.0.mlp.linear_fc1.bias",
        "merger.fc1",
        "language.output_layer.bias",
    ],
)
def test_a_name_that_the_model_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(KeyError, match=r"is no parameter of this model.*sharding_table\.py"):
        sharding_table(MODELS["untied"])[name]

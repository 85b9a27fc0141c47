"""How tp shards each parameter: a table that names all of them, once, and guesses nothing."""

from itertools import product

import pytest
import torch

from triptych.checkpoints.hf.name_table import name_table
from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.models.build import build_model
from triptych.models.init import HEAD
from triptych.models.kernels import Installed, choose
from triptych.models.parameters import global_parameters
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import TensorSharding, full_shape, pattern_of, shard, unshard
from triptych.tests.helpers.reference import TOWERS, small_model
from triptych.tests.helpers.single import alone


@pytest.mark.parametrize("sharding", TensorSharding)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_shards_of_a_tensor_make_it_up(sharding: TensorSharding, tp: int) -> None:
    full = torch.arange(16.0 * 8).view(16, 8)
    shards = [shard(full, sharding, rank, tp) for rank in range(tp)]
    assert torch.equal(unshard(shards, sharding), full)
    assert {full_shape(one, sharding, tp) for one in shards} == {full.shape}


@pytest.mark.parametrize(("tower", "tied"), list(product(TOWERS, (False, True))))
def test_every_parameter_is_in_the_table_and_nothing_else(tower: str, tied: bool) -> None:
    model = small_model(heads=4, kv_heads=2, tied=tied, tower=tower)
    kernels = choose(Kernels.auto, Precision.fp32, Installed.here())
    with alone() as mesh:
        chunks = build_model(model, ParallelConfig(), Precision.fp32, [4], mesh, kernels)
    found = {name for name, _ in global_parameters(chunks)} | {HEAD}  # a tied head has no own
    assert found == name_table(model).keys()
    assert {pattern_of(name) for name in found} == sharding_table(model).patterns.keys()


@pytest.mark.parametrize(("tower", "expected"), [("plain", "ROWS"), ("gated", "GATED_ROWS")])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_the_description_says_whether_the_first_layer_is_gated(tower, expected, leaf) -> None:
    table = sharding_table(small_model(heads=4, kv_heads=2, tied=False, tower=tower))
    name = f"vision.decoder.layers.1.mlp.linear_fc1.{leaf}"
    assert table[name] is TensorSharding[expected]


@pytest.mark.parametrize(
    "name",
    [
        "vision.decoder.layers.0.mlp.linear_fc3.weight",
        "vision.decoder.layers.0.input_layernorm.bias",
        "language.decoder.layers.0.mlp.linear_fc1.bias",
        "merger.fc1",
        "language.output_layer.bias",
    ],
)
def test_a_name_that_the_model_does_not_have_is_refused(name: str) -> None:
    table = sharding_table(small_model(heads=4, kv_heads=2, tied=False, tower="gated"))
    with pytest.raises(KeyError, match=r"is no parameter of this model.*sharding_table\.py"):
        table[name]

"""The shipped models have as many parameters as the released ones; no weight is made."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from triptych.checkpoints.hf.name_table import name_table
from triptych.configs.compose import load_config
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Kernels, ParallelConfig, Part, Precision
from triptych.models.kernels import choose_here
from triptych.models.parameters import global_parameters, part_of
from triptych.models.qwen_vl.model import Qwen2VL
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import full_shape
from triptych.parallel.mesh import Mesh, build_mesh, shutdown
from triptych.tests.helpers.limits import HANG_S

NUM_PARAMETERS = {
    "debug": {"vit and adapter": 1_106_752, "all": 2_830_336},
    "qwen2_vl_2b": {"vit and adapter": 665_271_296, "all": 2_208_985_600},
    "qwen2_vl_7b": {"vit and adapter": 675_759_104, "all": 8_291_375_616},
    "qwen2_vl_72b": {"vit and adapter": 699_356_672, "all": 73_405_560_320},
}
"""A tied head counts once. debug: added up by hand in ``test_debug_by_hand``."""


@contextmanager
def as_rank(rank: int, tp: int, pp: int) -> Iterator[Mesh]:
    """This process as one of tp * pp ranks; the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp)
    try:
        yield build_mesh(tp, pp, seed=0, timeout_s=HANG_S)
    finally:
        shutdown()


def model_named(name: str) -> ModelConfig:
    return load_config([f"model={name}"]).model


def build(
    model: ModelConfig, parallel: ParallelConfig, mesh: Mesh, device: str = "meta"
) -> Qwen2VL:
    layers = [model.language.num_layers // parallel.pp] * parallel.pp
    with torch.device(device):
        [place] = mesh.places(1)
        kernels = choose_here(Kernels.auto, Precision.bf16)
        piece = Qwen2VL(model, parallel, Precision.bf16, layers, place, kernels)
    assert {p.device.type for p in piece.parameters()} == {device}
    assert {p.dtype for p in piece.parameters()} == {torch.bfloat16}
    return piece


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_modules_have_as_many_parameters_as_the_released_model(name):
    model = model_named(name)
    counts: Counter[Part] = Counter()
    with as_rank(0, tp=1, pp=1) as mesh:
        piece = build(model, ParallelConfig(), mesh)
        for parameter_name, parameter in global_parameters([piece]):
            counts[part_of(parameter_name)] += parameter.numel()
    assert counts[Part.VIT] + counts[Part.ADAPTER] == NUM_PARAMETERS[name]["vit and adapter"]
    assert counts.total() == NUM_PARAMETERS[name]["all"]


def test_debug_by_hand():
    e, f, h, i = 128, 512, 192, 512
    block = 2 * 2 * e + (3 * e * e + 3 * e) + (e * e + e) + (f * e + f) + (e * f + e)
    merger = 2 * e + (512 * 512 + 512) + (h * 512 + h)
    vision = e * 1176 + 3 * block + merger
    qkv = (4 + 2 * 2) * 48
    layer = 2 * h + (qkv * h + qkv) + h * h + 3 * i * h
    language = 512 * h + 4 * layer + h
    assert NUM_PARAMETERS["debug"] == {"vit and adapter": vision, "all": vision + language}


@pytest.mark.parametrize(
    ("name", "tp", "pp", "device"),
    [
        ("debug", 2, 2, "cpu"),  # tied: megatron-core sends the embedding to the last stage at once
        ("qwen2_vl_7b", 4, 2, "meta"),
        ("qwen2_vl_72b", 8, 8, "meta"),
    ],
)
def test_the_pieces_of_all_stages_make_up_the_model(name, tp, pp, device):
    """Each tensor lies whole on the tp ranks of one stage; a tied head on first and last stage."""
    model = model_named(name)
    table, sharding = name_table(model), sharding_table(model)
    found: list[str] = []
    for pp_rank, tp_rank in product(range(pp), {0, tp - 1}):
        with as_rank(pp_rank * tp + tp_rank, tp, pp) as mesh:
            assert (mesh.pp_rank, mesh.tp_rank) == (pp_rank, tp_rank)
            piece = build(model, ParallelConfig(tp=tp, pp=pp), mesh, device)
        for parameter_name, parameter in global_parameters([piece]):
            shape = full_shape(parameter, sharding[parameter_name], tp)
            assert shape == table[parameter_name].shape, parameter_name
            if tp_rank == 0:
                found.append(parameter_name)
    assert sorted(found) == sorted(table)

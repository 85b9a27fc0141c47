"""A ViT with RMSNorm, gated MLPs and windows, and its merger, equal transformers' Qwen2.5-VL.

pytest -s tests/models/test_vision_family.py      # prints how far they are apart
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from triptych.checkpoints.hf.name_table import name_table
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.data.patch_layout import PatchLayout
from triptych.models.kernels import Installed, choose
from triptych.models.parameters import global_parameters
from triptych.models.qwen_vl.merger import Merger
from triptych.models.qwen_vl.vision import VisionTower
from triptych.parallel.mesh import Mesh
from triptych.tests.helpers.reference import normalized, perturb, small_model
from triptych.tests.helpers.single import alone

GRIDS = [(1, 4, 6), (2, 10, 8), (1, 18, 4), (1, 2, 2)]
"""Some are cut by windows of 4 x 4 patches, some are smaller."""
BAR = 2e-5
"""Largest difference / largest element; measured: 2.2e-6."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


def theirs_of(model: ModelConfig) -> nn.Module:
    """Their tower, with perturbed random weights."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    vision = model.vision
    config: Any = Qwen2_5_VLVisionConfig(
        depth=vision.depth,
        hidden_size=vision.hidden_size,
        num_heads=vision.num_heads,
        intermediate_size=vision.intermediate_size,
        out_hidden_size=model.language.hidden_size,
        window_size=vision.window_size or 112,
        fullatt_block_indexes=[i for i in range(vision.depth) if not vision.sees_windows(i)],
    )
    config._attn_implementation = "sdpa"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config).float()
    perturb(tower, seed=0)
    return tower


def ours_of(model: ModelConfig, theirs: nn.Module, mesh: Mesh) -> nn.ModuleDict:
    """Our tower and merger, with their weights."""
    kernels = choose(Kernels.auto, Precision.fp32, Installed.here())
    [place] = mesh.places(1)
    ours = nn.ModuleDict(
        {
            "vision": VisionTower(model.vision, ParallelConfig(), Precision.fp32, place, kernels),
            "merger": Merger(model.vision, model.language, Precision.fp32),
        }
    )
    table, weights = name_table(model), theirs.state_dict()
    with torch.no_grad():
        for name, parameter in global_parameters([ours]):
            parts = [weights[hf.removeprefix("visual.")] for hf in table[name].theirs]
            parameter.copy_(table[name].transform.to_ours(parts))
    return ours


def gradients(ours: nn.ModuleDict, model: ModelConfig) -> dict[str, Tensor]:
    """By their names, in their shapes."""
    table = name_table(model)
    grads: dict[str, Tensor] = {}
    for name, parameter in global_parameters([ours]):
        assert parameter.grad is not None, name
        parts = table[name].transform.to_theirs(parameter.grad)
        grads |= dict(zip(table[name].theirs, parts, strict=True))
    return {name.removeprefix("visual."): grad for name, grad in grads.items()}


@pytest.mark.parametrize("tower", ["gated", "windowed"])
def test_tokens_and_gradients_equal_transformers(tower: str, mesh: Mesh) -> None:
    model = small_model(heads=4, kv_heads=2, tied=False, tower=tower)
    theirs = theirs_of(model)
    ours = ours_of(model, theirs, mesh)
    rng, grid_thw = np.random.default_rng(0), torch.tensor(GRIDS)
    num_patches = int(grid_thw.prod(dim=1).sum())
    pixels = rng.integers(0, 256, (num_patches, model.vision.patch_dim), dtype=np.uint8)

    want = theirs(normalized(pixels).float(), grid_thw).pooler_output
    patches = PatchLayout.of(grid_thw, model.vision)
    got = ours["merger"](ours["vision"](torch.tensor(pixels), patches))
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
    want.backward(upstream)
    got.backward(upstream)

    found = gradients(ours, model)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    floor = 1e-7 * max(float(grad.abs().max()) for grad in expected.values())
    worst = max(apart(found[name], grad, floor) for name, grad in expected.items())
    print(f"{tower}: tokens {apart(got, want):.1e}, gradients {worst:.1e}")
    assert apart(got, want) <= BAR
    assert worst <= BAR


def apart(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    return float((got - want).detach().abs().max()) / max(float(want.detach().abs().max()), floor)

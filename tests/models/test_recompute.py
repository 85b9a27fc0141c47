"""Recomputation gives the same gradients from fewer bytes; a frozen tower keeps none."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import (
    Kernels,
    ParallelConfig,
    Part,
    Precision,
    Recompute,
    RecomputeConfig,
)
from triptych.models.build import build_model
from triptych.models.fake_rank import saved_storages
from triptych.models.init import init_parameters
from triptych.models.kernels import choose_here
from triptych.models.parameters import part_of
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.parallel.mesh import Mesh
from triptych.tests.helpers.reference import conversations, small_model
from triptych.tests.helpers.single import alone, pack

MODEL = small_model(heads=4, kv_heads=2, tied=False)
EVERY_PART = (Part.VIT, Part.ADAPTER, Part.LLM)

LEAST_KEPT_LAST = {
    "none": RecomputeConfig(),
    "core_attn": RecomputeConfig(llm=Recompute.selective, modules=["core_attn"]),
    "mlp": RecomputeConfig(llm=Recompute.selective, modules=["mlp"]),
    "core_attn, mlp": RecomputeConfig(llm=Recompute.selective, modules=["core_attn", "mlp"]),
    "llm": RecomputeConfig(llm=Recompute.full),
    "llm, vit": RecomputeConfig(llm=Recompute.full, vit=Recompute.full),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


def run(
    mesh: Mesh,
    recompute: RecomputeConfig,
    *,
    model: ModelConfig = MODEL,
    trained: Sequence[Part] = EVERY_PART,
) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept between forward and backward pass, each storage once, and the gradients."""
    parallel = ParallelConfig(recompute=recompute)
    layers = [model.language.num_layers]
    kernels = choose_here(Kernels.auto, Precision.fp32)
    [piece] = chunks = build_model(model, parallel, Precision.fp32, layers, mesh, kernels)
    init_parameters(chunks, sharding_table(model), mesh, 0)
    freeze(piece, trained)
    with saved_storages(piece) as kept:
        loss = piece(pack(conversations(0)))
    num_bytes = sum(storage.nbytes() for storage in kept)
    loss.backward()
    return num_bytes, {name: p.grad for name, p in piece.named_parameters() if p.requires_grad}


def freeze(piece: nn.Module, trained: Sequence[Part]) -> None:
    for name, parameter in piece.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)


def test_fewer_bytes_and_the_same_gradients(mesh):
    runs = {name: run(mesh, recompute) for name, recompute in LEAST_KEPT_LAST.items()}
    kept = [num_bytes for num_bytes, _ in runs.values()]
    print(dict(zip(runs, kept, strict=True)))
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)
    _, want = runs["none"]
    for name, (_, grads) in runs.items():
        assert grads.keys() == want.keys()
        assert all(torch.equal(grads[key], want[key]) for key in want), name


@pytest.mark.parametrize("trained", [(Part.ADAPTER, Part.LLM), (Part.LLM,)], ids=str)
def test_a_frozen_vit_keeps_nothing(trained, mesh):
    """However deep it is."""
    deep = replace(MODEL, vision=replace(MODEL.vision, depth=4))
    shallow_bytes, _ = run(mesh, RecomputeConfig(), trained=trained)
    deep_bytes, _ = run(mesh, RecomputeConfig(), model=deep, trained=trained)
    assert deep_bytes == shallow_bytes
    trained_bytes, _ = run(mesh, RecomputeConfig(), model=deep)
    assert trained_bytes > deep_bytes

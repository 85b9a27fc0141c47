"""One pack through our model equals transformers sample by sample: logits, loss and gradients.

pytest -s tests/models/test_parity.py      # prints the tables of docs/parity.md
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Precision
from triptych.parallel.mesh import Mesh
from triptych.tests.helpers.reference import (
    BAR,
    Conversation,
    Distance,
    Outcome,
    distance,
    fp64_throughout,
    random_conversations,
    run_reference,
    save_reference,
    small_model,
    transformers_model,
)
from triptych.tests.helpers.single import alone, load_ours, pack, run_ours

BF16_BAND = Distance(logits=8e-2, loss=8e-3, grads=1.0)
"""Sanity only: more than twice what was measured, and what transformers' own bf16 shows."""

MODELS = {
    "2/2 tied": small_model(heads=2, kv_heads=2, tied=True, head_dim=24, vision_heads=2),
    "4/2": small_model(heads=4, kv_heads=2, tied=False),
    "6/2 tied": small_model(heads=6, kv_heads=2, tied=True, head_dim=8, vision_head_dim=8),
    "8/2": small_model(heads=8, kv_heads=2, tied=False, head_dim=8, vision_heads=1),
    "5/1 tied": small_model(heads=5, kv_heads=1, tied=True, head_dim=24, vision_heads=3),
    "6/1": small_model(heads=6, kv_heads=1, tied=False, vision_head_dim=24),
    "7/1 tied": small_model(heads=7, kv_heads=1, tied=True, vision_heads=5),
    "14/2": small_model(heads=14, kv_heads=2, tied=False, head_dim=8, num_layers=3),
}
"""By heads / kv heads: ratios 1 to 7."""


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Lines that are printed when all is measured."""
    lines: list[str] = []
    yield lines
    print("", *lines, sep="\n")


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name, mesh, table, tmp_path):
    model, seed = MODELS[name], list(MODELS).index(name)
    samples = random_conversations(seed)
    reference = transformers_model(model, seed)
    theirs = run_reference(reference, samples)
    ours = run_single(reference, model, samples, mesh, tmp_path)
    with fp64_throughout():
        exact = run_reference(copy.deepcopy(reference).double(), samples)

    sizes = [float(grad.abs().max()) for grad in theirs.grads.values()]
    assert min(sizes) > 1e-4 * max(sizes), "a gradient that is zero would compare nothing"
    measured = {
        "ours, theirs": distance(ours, theirs),
        "ours, fp64": distance(ours, exact),
        "theirs, fp64": distance(theirs, exact),
    }
    table += [f"{name:9} {pair:13} {apart}" for pair, apart in measured.items()]
    assert measured["ours, theirs"].times(BAR).largest <= 1
    assert measured["ours, fp64"].times(BAR).largest <= 1


@pytest.mark.parametrize("name", ["2/2 tied", "4/2", "5/1 tied"])
def test_bf16_stays_within_its_band(name, mesh, table, tmp_path):
    """Weights, activations and gradients in bf16 against all in fp32."""
    model, seed = MODELS[name], list(MODELS).index(name)
    samples = random_conversations(seed)
    reference = transformers_model(model, seed)
    theirs = run_reference(reference, samples)
    ours = run_single(reference, model, samples, mesh, tmp_path, Precision.bf16)
    assert all(grad.dtype is torch.bfloat16 for grad in ours.grads.values())
    measured = distance(ours, theirs)
    in_bf16 = distance(run_reference(reference.bfloat16(), samples), theirs)
    table += [f"{name:9} ours bf16     {measured}", f"{name:9} theirs bf16   {in_bf16}"]
    assert measured.times(BF16_BAND).largest <= 1


def run_single(
    reference: nn.Module,
    model: ModelConfig,
    samples: Sequence[Conversation],
    mesh: Mesh,
    folder: Path,
    precision: Precision = Precision.fp32,
) -> Outcome:
    """The samples in one pack, through our model with the reference's weights."""
    piece = load_ours(save_reference(reference, folder), model, mesh, precision)
    return run_ours(piece, pack(samples), model)

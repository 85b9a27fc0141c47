"""A sample gets the same logits, and gives the same gradients, whatever it is packed with."""

from collections.abc import Iterator, Sequence
from itertools import permutations

import pytest
from torch import Tensor, nn

from triptych.configs.model_schema import ModelConfig
from triptych.parallel.mesh import Mesh
from triptych.tests.helpers.reference import (
    Conversation,
    conversations,
    random_conversations,
    save_reference,
    small_model,
    transformers_model,
)
from triptych.tests.helpers.single import (
    alone,
    backward,
    gradients,
    load_ours,
    logits_by_sample,
    pack,
)

BAR = 1e-5
"""Of the largest logit, or of a tensor's largest gradient; measured: docs/parity.md."""

MODEL: ModelConfig = small_model(heads=6, kv_heads=2, tied=True)
SAMPLES = {"given shapes": conversations(1), "random shapes": random_conversations(2)}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def piece(mesh, tmp_path_factory) -> nn.Module:
    folder = save_reference(transformers_model(MODEL, 0), tmp_path_factory.mktemp("hf"))
    return load_ours(folder, MODEL, mesh)


@pytest.mark.parametrize("pad_to", [1, 4])
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_logits_in_a_pack_are_those_alone(samples, pad_to, piece):
    batch = pack(samples, pad_to=pad_to)
    assert len(batch.input_ids) % pad_to == 0
    together = logits_by_sample(piece, batch)
    alone = [logits_by_sample(piece, pack([sample]))[0] for sample in samples]
    worst = max(relative(g, w) for g, w in zip(together, alone, strict=True))
    print(f"\nlogits in a pack, {pad_to=}: {worst:.1e}")
    assert worst <= BAR


def test_neighbours_do_not_matter(piece):
    """Three samples in every order: each keeps its logits."""
    samples = conversations(3)[:3]
    alone = [logits_by_sample(piece, pack([sample]))[0] for sample in samples]
    for order in permutations(range(3)):
        together = logits_by_sample(piece, pack([samples[i] for i in order], pad_to=4))
        for i, logits in zip(order, together, strict=True):
            assert relative(logits, alone[i]) <= BAR


@pytest.mark.parametrize("pad_to", [1, 4])
def test_gradients_of_a_pack_are_the_sums_of_those_alone(pad_to, piece):
    samples = conversations(4)
    together = summed_gradients(piece, [samples], pad_to)
    apart = summed_gradients(piece, [[sample] for sample in samples], 1)
    assert together.keys() == apart.keys()
    worst = max(relative(together[name], apart[name]) for name in apart)
    print(f"\ngradients of a pack, {pad_to=}: {worst:.1e}")
    assert worst <= BAR


def summed_gradients(
    piece: nn.Module, packs: Sequence[Sequence[Conversation]], pad_to: int
) -> dict[str, Tensor]:
    """Of the summed loss, by Hugging Face name, accumulated over the packs."""
    piece.zero_grad()
    for samples in packs:
        backward(piece, pack(samples, pad_to=pad_to))
    return {name: grad.clone() for name, grad in gradients(piece, MODEL).items()}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())

"""Random weights that do not depend on the layout.

Each parameter is drawn from its own generator, by its global name.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from triptych.models.parameters import full_shape, global_parameters, shard, sharding_of
from triptych.parallel.mesh import Mesh

EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"
EMBEDDING_STD = 0.02


def init_parameters(chunks: Iterable[nn.Module], mesh: Mesh, seed: int, *, tied: bool) -> None:
    """Draw every parameter of this rank.

    Matrices are normal with deviation 1 / sqrt(fan_in), norm weights are 1, biases 0.
    The same ``seed`` gives the same model in every layout. Makes the full tensor of one parameter
    at a time on the CPU.

    Args:
        chunks: this rank's pieces of the model.
        mesh: this rank's place.
        seed: decides every weight.
        tied: the head is the embedding, also where both lie on different pipeline stages.
    """
    with torch.no_grad():
        for name, parameter in global_parameters(chunks):
            sharding = sharding_of(name)
            drawn_as = EMBEDDING if tied and name == HEAD else name
            full = _draw(drawn_as, full_shape(parameter, sharding, mesh.dims.tp), seed)
            parameter.copy_(shard(full, sharding, mesh.tp_rank, mesh.dims.tp))


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    std = EMBEDDING_STD if name == EMBEDDING else shape[-1] ** -0.5
    return torch.empty(shape).normal_(0.0, std, generator=generator)

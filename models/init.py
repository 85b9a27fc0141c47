"""Random weights that do not depend on the layout.

Each parameter is drawn from its own generator, by its global name.
"""

import hashlib
from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from triptych.models.parameters import global_parameters
from triptych.models.sharding import ShardingTable, full_shape, shard
from triptych.parallel.mesh import Mesh

EMBEDDING = "language.embedding.word_embeddings.weight"
HEAD = "language.output_layer.weight"
EMBEDDING_STD = 0.02


def init_parameters(
    chunks: Iterable[nn.Module],
    table: ShardingTable,
    mesh: Mesh,
    seed: int,
    but: Container[str] = (),
) -> None:
    """Draw the parameters of this rank.

    Matrices are normal with deviation 1 / sqrt(fan_in), norm weights are 1, biases 0.
    The same ``seed`` gives the same model in every layout. Makes the full tensor of one parameter
    at a time on the CPU.

    Args:
        chunks: this rank's pieces of the model.
        table: how the model's parameters lie over the ranks.
        mesh: this rank's place.
        seed: decides every weight.
        but: names of those that are left as they are.
    """
    with torch.no_grad():
        for name, parameter in global_parameters(chunks):
            if name in but:
                continue
            sharding = table[name]
            drawn_as = EMBEDDING if table.tied and name == HEAD else name
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

"""Weights that every tensor-parallel rank holds a copy of, and how far the copies have drifted.

Norms, biases of row-parallel layers, the patch embedding and the merger get the same gradient on
every rank up to rounding, as no collective of each step makes them equal: on a GPU the order of a
sum may differ from rank to rank. At a checkpoint, which takes seconds anyway, the copies are
compared, and averaged where they differ, together with their optimizer state. So what is saved,
one copy of each, is also what the run goes on with.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.parallel.mesh import Mesh
from triptych.parallel.zero.protocol import ShardedOptimizer


@dataclass(frozen=True, slots=True)
class Drift:
    """The copies that lay furthest apart, before they were averaged."""

    largest: float
    """Largest difference of two copies of an element, over the largest element of its tensor."""
    name: str
    """The tensor; empty where all copies are equal."""

    def __str__(self) -> str:
        return f"{self.largest:.1e} of {self.name}" if self.name else "none"


def reduce_replicas(
    replicas: Mapping[str, nn.Parameter], optimizer: ShardedOptimizer, mesh: Mesh
) -> Drift:
    """Average the copies of each tensor that differ between tensor-parallel ranks.

    Copies that are equal keep every bit. Every rank must call this.

    Args:
        replicas: this rank's replicated parameters, by global name; the same on all tp ranks.
        optimizer: whose master weights and moments drift with the weights.
        mesh: this rank's place.

    Returns:
        The worst of all stages, the same on every rank.
    """
    if mesh.dims.tp == 1:
        return Drift(0.0, "")
    optimizer.gather_weights()
    copies = list(_copies(replicas, optimizer))
    spans = [_span(tensor, mesh) for _, tensor in copies]
    measured = torch.stack(spans).tolist() if spans else []  # the host waits once for all
    drifts = {"": 0.0}
    for (name, tensor), (apart, largest) in zip(copies, measured, strict=True):
        if apart > 0:
            drifts[name] = max(drifts.get(name, 0.0), apart / largest)
            mean = tensor.float()
            dist.all_reduce(mean, group=mesh.tp_group)
            tensor.copy_(mean / mesh.dims.tp)
    worst = max(drifts, key=lambda name: drifts[name])
    everyone: list[Drift] = mesh.world.all_gather(Drift(drifts[worst], worst))
    return max(everyone, key=lambda drift: drift.largest)


def _copies(
    replicas: Mapping[str, nn.Parameter], optimizer: ShardedOptimizer
) -> Iterator[tuple[str, Tensor]]:
    """Weights, and what this rank has of their state: the same ranges on every tp rank."""
    for name, parameter in replicas.items():
        yield name, parameter.detach()
    for name, (_, tensors) in optimizer.state_shards().items():
        if name in replicas:
            yield from ((name, tensor) for tensor in tensors.values())


def _span(tensor: Tensor, mesh: Mesh) -> Tensor:
    """(2,) on the device: the largest difference of two copies, and the largest element of any."""
    ends = torch.stack([tensor.float(), -tensor.float()])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=mesh.tp_group)
    high, low = ends[0], -ends[1]
    return torch.stack([(high - low).max(), ends.max()])

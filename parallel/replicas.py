"""Weights that every tensor-parallel rank holds a copy of, and how far the copies have drifted.

Norms, biases of row-parallel layers, the patch embedding and the merger get the same gradient on
every rank up to rounding, as no collective of each step makes them equal: on a GPU the order of a
sum may differ from rank to rank. At a checkpoint, which takes seconds anyway, the copies are
compared, and averaged where they differ, together with their optimizer state. So what is saved,
one copy of each, is also what the run goes on with.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
    state = optimizer.state_by_param(set(replicas))
    drifts = {name: _average_weight(p, mesh) for name, p in replicas.items()}
    drifted = set()
    for name, tensors in state.items():
        apart = max([_average(tensor, mesh) for tensor in tensors.values()])
        drifts[name] = max(drifts[name], apart)
        if drifts[name] > 0:
            drifted.add(name)
            replicas[name].data.copy_(tensors["master"])
    optimizer.load_state_by_param({name: state[name] for name in drifted}, optimizer.num_updates)
    name = max(drifts, key=lambda name: drifts[name], default="")
    mine = Drift(drifts[name], name) if name and drifts[name] > 0 else Drift(0.0, "")
    everyone: list[Drift] = mesh.world.all_gather(mine)
    return max(everyone, key=lambda drift: drift.largest)


def _average_weight(parameter: nn.Parameter, mesh: Mesh) -> float:
    """``_average`` in fp32, as most weights are bf16."""
    weight = parameter.detach().float()
    drift = _average(weight, mesh)
    if drift > 0:
        parameter.data.copy_(weight)
    return drift


def _average(tensor: Tensor, mesh: Mesh) -> float:
    """Average in place over the tp ranks where they differ; returns by how much, relatively."""
    mean = tensor.to(mesh.device, copy=True)
    low, high = mean.clone(), mean.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=mesh.tp_group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=mesh.tp_group)
    apart = float((high - low).max())
    if apart > 0:
        dist.all_reduce(mean, group=mesh.tp_group)
        tensor.copy_(mean / mesh.dims.tp)
    return apart / max(float(high.abs().max()), float(low.abs().max())) if apart else 0.0

"""Who trains: parameters of each part over all ranks, as a table, checked against the stage."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from triptych.configs.schema import Part
from triptych.models.init import HEAD
from triptych.models.parameters import part_of
from triptych.models.sharding import ShardingTable, TensorSharding
from triptych.parallel.mesh import Mesh
from triptych.train.stages.stage import Stage


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of each part, replicated and tied ones counted once."""

    trained: dict[Part, int]
    frozen: dict[Part, int]

    def __str__(self) -> str:
        rows = [(part.value, self.trained[part], self.frozen[part]) for part in Part]
        rows.append(("total", sum(self.trained.values()), sum(self.frozen.values())))
        head = f"{'part':<10}{'trained':>18}{'frozen':>18}"
        return "\n".join([head, *(f"{name:<10}{t:>18,}{f:>18,}" for name, t, f in rows)])


def count_parameters(
    parameters: Mapping[str, nn.Parameter], sharding: ShardingTable, mesh: Mesh
) -> ParameterCounts:
    """Count over all stages and tensor-parallel ranks.

    Every rank of ``model_group`` must call this.
    """
    counts = torch.zeros(2, len(Part), dtype=torch.int64, device=mesh.device)
    for name, parameter in parameters.items():
        is_copy = name == HEAD and not mesh.is_first_pp_stage and _is_shared(parameter)
        if is_copy or (mesh.tp_rank > 0 and sharding[name] is TensorSharding.REPLICATED):
            continue
        row = 0 if parameter.requires_grad else 1
        counts[row, list(Part).index(part_of(name))] += parameter.numel()
    dist.all_reduce(counts, group=mesh.model_group)
    trained, frozen = (dict(zip(Part, row, strict=True)) for row in counts.tolist())
    return ParameterCounts(trained, frozen)


def check_trained_parts(stage: Stage, counts: ParameterCounts) -> None:
    """Each part trains as a whole or not at all, as the stage says."""
    for part in Part:
        unwanted = counts.frozen if part in stage.trained_parts else counts.trained
        assert unwanted[part] == 0, f"{stage.name}: {part.value} is not as declared\n{counts}"


def _is_shared(parameter: nn.Parameter) -> bool:
    """megatron-core marks both copies of a tied embedding."""
    return bool(getattr(parameter, "shared_embedding", False))

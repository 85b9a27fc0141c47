"""Whether the stored tensors are those of this model, and what a person is told if not."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from triptych.checkpoints.pieces import Tensors, stored_keys, stored_shape
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.models.sharding import ShardingTable, pattern_of
from triptych.parallel.mesh import Mesh


def tensor_problems(
    stored: StoredTensors,
    kinds: Mapping[str, Tensors],
    mesh: Mesh,
    table: ShardingTable,
    *,
    strict: str | None,
) -> list[str]:
    """Every missing, unexpected and mis-shaped tensor, a line for all layers that share one.

    Every rank must call this.

    Args:
        stored: in the checkpoint.
        kinds: kind -> global name -> this rank's parameter, for its shape.
        mesh: this rank's place.
        table: how the model's parameters lie over the ranks.
        strict: the kind of which nothing may be stored that this model does not have, if any.
    """
    mine = {
        key: stored_shape(name, tensor, mesh, table)
        for kind, tensors in kinds.items()
        for name, tensor in tensors.items()
        for key in stored_keys(kind, name, table)
    }
    wanted = {key: shape for keys in mesh.world.all_gather(mine) for key, shape in keys.items()}
    found = stored.shapes
    of_kind = {key for key in found if key.startswith(f"{strict}.")}
    return _one_line_for_all_layers(
        [
            *(f"missing: {key} {wanted[key]}" for key in sorted(wanted.keys() - found.keys())),
            *(f"unexpected: {key} {found[key]}" for key in sorted(of_kind - wanted.keys())),
            *(
                f"mis-shaped: {key} is {found[key]}, this model has {wanted[key]}"
                for key in sorted(wanted.keys() & found.keys())
                if wanted[key] != found[key]
            ),
        ]
    )


def _one_line_for_all_layers(problems: Sequence[str]) -> list[str]:
    groups = defaultdict(list)
    for problem in problems:
        groups[pattern_of(problem)].append(problem)
    return [
        group[0] if len(group) == 1 else f"{pattern} ({len(group)} layers)"
        for pattern, group in groups.items()
    ]

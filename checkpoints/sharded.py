"""Parameters and optimizer state as sharded tensors, under names that no layout changes.

A key is ``<kind>.<global name>``: ``model.language.decoder.layers.0...``, ``exp_avg.vision...``. A
gated matrix [gate; up], of which each tp rank holds a piece of both halves, is stored as two
tensors, ``….gate`` and ``….up``. A tied head is its embedding.
"""

import queue
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil  # noqa: F401  # without it megatron-core's writing process dies, and saving hangs
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from triptych.checkpoints.metadata_pickle import refusing_code
from triptych.errors import CheckpointError
from triptych.models.init import EMBEDDING, HEAD
from triptych.models.sharding import ShardingTable, TensorSharding, pattern_of
from triptych.parallel.mesh import Mesh

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)

Tensors = Mapping[str, Tensor]
HALVES = ("gate", "up")

# megatron-core would start a Python of its own beside every rank, with torch and the main module in
# it, to hold this queue. We save synchronously: the process that fills it is the one that reads it.
filesystem_async._results_queue = queue.Queue()


def save_tensors(
    folder: Path, kinds: Mapping[str, Tensors], mesh: Mesh, table: ShardingTable
) -> None:
    """Write this rank's tensors, each byte by one of its replicas. Every rank must call this.

    Args:
        folder: an empty folder.
        kinds: kind -> global name -> this rank's piece, whole over dp.
        mesh: this rank's place.
        table: how the model's parameters lie over the ranks.

    Raises:
        CheckpointError: on every rank alike, where some could not write; names them.
    """
    state = _sharded_state(kinds, mesh, table)
    strategy = get_default_save_sharded_strategy("torch_dist", 1)
    strategy = FullyParallelSaveStrategyWrapper(strategy, mesh.dp_group)
    try:
        dist_checkpointing.save(state, str(folder), strategy)
    except CheckpointException as error:  # raised on every rank; rank 0 alone knows what failed
        failures = [f"rank {rank}: {failure}" for rank, (failure, _) in error.failures.items()]
        raise CheckpointError("\n".join(mesh.world.all_gather(failures)[0])) from error


def load_tensors(
    folder: Path, kinds: Mapping[str, Tensors], mesh: Mesh, table: ShardingTable
) -> None:
    """Fill the given tensors, whatever layout wrote them.

    Every rank must call this. ``tensor_problems`` found none, or the tensors were made from the
    checkpoint's own ``model.json``.

    Args:
        folder: what ``save_tensors`` wrote.
        kinds: kind -> global name -> this rank's piece, overwritten.
        mesh: this rank's place.
        table: how the model's parameters lie over the ranks.

    Raises:
        CheckpointError: a file names what could run code.
    """
    state = _sharded_state(kinds, mesh, table)
    strategy = get_default_load_sharded_strategy(str(folder))
    strategy = FullyParallelLoadStrategyWrapper(strategy, mesh.dp_group)
    with refusing_code(folder):
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), strategy)
    with torch.no_grad():
        for kind, tensors in kinds.items():
            for name, tensor in tensors.items():
                for key, piece in _stored_pieces(kind, name, tensor, table):
                    piece.copy_(loaded[key])


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Full shape of every tensor in ``folder``, by key."""
    return {key: tuple(tensor.global_shape) for key, tensor in _stored(folder).items()}


def weights_dtype(folder: Path) -> torch.dtype:
    """The dtype in which the model's weights are stored; it is one for all of them."""
    stored = _stored(folder)
    dtype: torch.dtype = next(t.dtype for key, t in stored.items() if key.startswith("model."))
    return dtype


def _stored(folder: Path) -> Mapping[str, ShardedTensor]:
    """Descriptions of the tensors in ``folder``, by key.

    Raises:
        CheckpointError: its metadata name what could run code.
    """
    with refusing_code(folder):
        stored: Mapping[str, ShardedTensor] = dist_checkpointing.load_tensors_metadata(str(folder))
    return stored


def check_tensors(
    folder: Path,
    kinds: Mapping[str, Tensors],
    mesh: Mesh,
    table: ShardingTable,
    *,
    strict: str | None,
) -> None:
    """Compare what is stored with what this model has. Every rank must call this.

    Raises:
        CheckpointError: on every rank; lists all ``tensor_problems``.
    """
    if problems := tensor_problems(folder, kinds, mesh, table, strict=strict):
        raise CheckpointError(f"{folder} is of another model:\n  " + "\n  ".join(problems))


def tensor_problems(
    folder: Path,
    kinds: Mapping[str, Tensors],
    mesh: Mesh,
    table: ShardingTable,
    *,
    strict: str | None,
) -> list[str]:
    """Every missing, unexpected and mis-shaped tensor, a line for all layers that share one.

    Every rank must call this.

    Args:
        folder: what ``save_tensors`` wrote.
        kinds: as for ``load_tensors``.
        mesh: this rank's place.
        table: how the model's parameters lie over the ranks.
        strict: the kind of which nothing may be stored that this model does not have, if any.
    """
    mine = {
        key: tuple(tensor.global_shape)
        for key, tensor in _sharded_state(kinds, mesh, table).items()
    }
    wanted = {key: shape for keys in mesh.world.all_gather(mine) for key, shape in keys.items()}
    found = stored_shapes(folder)
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


def stored_keys(kind: str, name: str, table: ShardingTable) -> list[str]:
    """The keys under which a parameter, or its optimizer state, is stored."""
    stored_as = EMBEDDING if table.tied and name == HEAD else name
    halves = HALVES if table[name] is TensorSharding.GATED_ROWS else ("",)
    return [".".join(filter(None, (kind, stored_as, half))) for half in halves]


def _one_line_for_all_layers(problems: Sequence[str]) -> list[str]:
    groups = defaultdict(list)
    for problem in problems:
        groups[pattern_of(problem)].append(problem)
    return [
        group[0] if len(group) == 1 else f"{pattern} ({len(group)} layers)"
        for pattern, group in groups.items()
    ]


def _sharded_state(
    kinds: Mapping[str, Tensors], mesh: Mesh, table: ShardingTable
) -> dict[str, ShardedTensor]:
    """This rank's sharded tensors by key."""
    return {
        key: _sharded_tensor(key, name, piece, mesh, table)
        for kind, tensors in kinds.items()
        for name, tensor in tensors.items()
        for key, piece in _stored_pieces(kind, name, tensor, table)
    }


def _stored_pieces(
    kind: str, name: str, tensor: Tensor, table: ShardingTable
) -> Iterator[tuple[str, Tensor]]:
    """Views of the tensor, each a block of one stored tensor, with its key."""
    pieces = tensor.chunk(2) if table[name] is TensorSharding.GATED_ROWS else (tensor,)
    return zip(stored_keys(kind, name, table), pieces, strict=True)


def _sharded_tensor(
    key: str, name: str, piece: Tensor, mesh: Mesh, table: ShardingTable
) -> ShardedTensor:
    sharding = table[name]
    offsets, tp_replica = [], mesh.tp_rank
    if sharding is not TensorSharding.REPLICATED:
        offsets = [(1 if sharding is TensorSharding.COLUMNS else 0, mesh.tp_rank, mesh.dims.tp)]
        tp_replica = 0
    replica = (int(table.tied and name == HEAD), tp_replica, mesh.dp_rank)
    return ShardedTensor.from_rank_offsets(key, piece.detach(), *offsets, replica_id=replica)

"""Which part of which stored tensor a rank holds, whatever the layout.

A key is ``<kind>.<global name>``: ``model.language.decoder.layers.0...``, ``exp_avg.vision...``. A
gated matrix [gate; up], of which each tp rank holds a piece of both halves, is stored as two
tensors, ``….gate`` and ``….up``. A tied head is its embedding.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.checkpoints.boxes import Box, boxes_of_range, split_range
from triptych.models.init import EMBEDDING, HEAD
from triptych.models.sharding import ShardingTable, TensorSharding, full_shape
from triptych.parallel.mesh import Mesh

Tensors = Mapping[str, Tensor]
HALVES = ("gate", "up")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of stored tensors, by name."""


class Piece(NamedTuple):
    """A range of a tensor of this rank: a weight, or something of its shape."""

    kind: str
    name: str
    """Global, of the parameter."""
    whole: Tensor
    """The parameter, for its shape."""
    start: int
    """Where the range begins in the flat tensor."""
    values: Tensor
    """(end - start,), to be saved or overwritten."""


class PlacedBox(NamedTuple):
    """A rectangle of a stored tensor, and the elements of a piece that lie in it."""

    key: str
    box: Box
    values: Tensor
    """(box.num_rows, box.num_columns); a view of the piece's."""


def own_part(kind: str, tensors: Tensors, mesh: Mesh) -> Iterator[Piece]:
    """This dp rank's part of tensors that all ranks of ``dp_group`` have whole."""
    ranges = split_range(
        [tensor.numel() for tensor in tensors.values()], mesh.dp_rank, mesh.dims.dp
    )
    for (name, tensor), (start, end) in zip(tensors.items(), ranges, strict=True):
        yield Piece(kind, name, tensor, start, tensor.detach().reshape(-1)[start:end])


def is_copy(name: str, mesh: Mesh, table: ShardingTable) -> bool:
    """Whether another rank saves the tensor: a tied head, or what every tp rank holds."""
    if table.tied and name == HEAD:
        return True
    return table[name] is TensorSharding.REPLICATED and mesh.tp_rank > 0


def placed_boxes(piece: Piece, mesh: Mesh, table: ShardingTable) -> Iterator[PlacedBox]:
    """The rectangles of stored tensors that a piece consists of, in the order of its values."""
    keys = stored_keys(piece.kind, piece.name, table)
    block = _block(piece, mesh, table)
    end = piece.start + len(piece.values)
    for number, key in enumerate(keys):
        before = number * block.numel
        start = max(piece.start, before)
        for box in boxes_of_range(block, start - before, min(end - before, block.numel)):
            first = start - piece.start
            values = piece.values[first : first + box.numel]
            yield PlacedBox(key, box, values.view(box.num_rows, box.num_columns))
            start += box.numel


def stored_keys(kind: str, name: str, table: ShardingTable) -> list[str]:
    """The keys under which a parameter, or its optimizer state, is stored."""
    stored_as = EMBEDDING if table.tied and name == HEAD else name
    halves = HALVES if table[name] is TensorSharding.GATED_ROWS else ("",)
    return [".".join(filter(None, (kind, stored_as, half))) for half in halves]


def stored_shape(name: str, tensor: Tensor, mesh: Mesh, table: ShardingTable) -> tuple[int, ...]:
    """The shape under which each of the ``stored_keys`` is stored."""
    rows, *columns = full_shape(tensor, table[name], mesh.dims.tp)
    return (rows // _num_halves(name, table), *columns)


def _block(piece: Piece, mesh: Mesh, table: ShardingTable) -> Box:
    """This tp rank's block of each of the stored tensors."""
    num_rows = piece.whole.shape[0] // _num_halves(piece.name, table)
    num_columns = piece.whole.numel() // piece.whole.shape[0]
    sharding = table[piece.name]
    row = mesh.tp_rank * num_rows
    if sharding in (TensorSharding.REPLICATED, TensorSharding.COLUMNS):
        row = 0
    column = mesh.tp_rank * num_columns if sharding is TensorSharding.COLUMNS else 0
    return Box(row, column, num_rows, num_columns)


def _num_halves(name: str, table: ShardingTable) -> int:
    return len(HALVES) if table[name] is TensorSharding.GATED_ROWS else 1

"""The tensors in a folder of shards, read into whatever layout wants them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from triptych.checkpoints.boxes import Box
from triptych.checkpoints.layout import ShardFiles
from triptych.checkpoints.pieces import DTYPES, Piece, Tensors, own_part, placed_boxes
from triptych.errors import CheckpointError
from triptych.models.sharding import ShardingTable
from triptych.parallel.agree import Ranks, on_rank_0
from triptych.parallel.mesh import Mesh
from triptych.parallel.zero.gather import gather_whole

READ_NUMEL = 1 << 22
"""Elements that are read at once, where a row is not longer."""


class StoredBox(NamedTuple):
    """A rectangle of a stored tensor, and where its elements lie."""

    file: Path
    offset: int
    """Bytes."""
    box: Box


@dataclass(slots=True)
class StoredTensor:
    """What the ranks that saved have told of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: list[StoredBox] = field(default_factory=list)


class StoredTensors:
    """The tensors in ``folder``, by key. Nothing of them is run: they are JSON and plain bytes."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self._folder, self._tensors = folder, tensors

    @classmethod
    def open(cls, folder: Path, ranks: Ranks) -> "StoredTensors":
        """Read, once for all ranks, what lies where. Every rank must call this.

        Raises:
            CheckpointError: on every rank: it cannot be read.
        """
        tensors = on_rank_0(ranks, lambda: _read_indices(folder), os_error=CheckpointError)
        return cls(folder, tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every tensor."""
        return {key: tensor.shape for key, tensor in self._tensors.items()}

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype in which the model's weights are stored; it is one for all of them."""
        return next(t.dtype for key, t in self._tensors.items() if key.startswith("model."))

    def read(self, pieces: Iterable[Piece], mesh: Mesh, table: ShardingTable) -> None:
        """Overwrite the values of ``pieces``, whatever layout wrote them. No collective.

        Raises:
            CheckpointError: the shards do not hold all of a piece, or end too early.
            OSError: they cannot be read.
        """
        for piece in pieces:
            for key, wanted, values in placed_boxes(piece, mesh, table):
                num_read = sum(
                    _read(stored, self._tensors[key].dtype, wanted, values)
                    for stored in self._tensors[key].boxes
                )
                if num_read != wanted.numel:
                    raise CheckpointError(
                        f"{self._folder} holds {num_read} of {wanted.numel} elements of {key} that "
                        "this rank needs  -> it was put together of several; restore it"
                    )

    def read_whole(self, kind: str, tensors: Tensors, mesh: Mesh, table: ShardingTable) -> None:
        """Overwrite tensors that all dp ranks hold: each rank reads its part and gets the others'.

        Every rank of ``dp_group`` must call this.
        """

        def parts() -> Iterator[tuple[Tensor, Tensor | None, int]]:
            for piece in own_part(kind, tensors, mesh):
                read = piece._replace(values=torch.empty_like(piece.values, dtype=torch.float32))
                self.read([read], mesh, table)
                yield piece.whole, read.values, piece.start

        with torch.no_grad():
            wholes = gather_whole(parts(), mesh)
            for tensor, whole in zip(tensors.values(), wholes, strict=True):
                tensor.copy_(whole)


def _read_indices(folder: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for files in ShardFiles.all(folder):
        try:
            for key, told in json.loads(files.index.read_bytes()).items():
                if key not in tensors:
                    tensors[key] = StoredTensor(DTYPES[told["dtype"]], tuple(told["shape"]))
                tensors[key].boxes += [
                    StoredBox(files.content, offset, Box(*box)) for offset, *box in told["boxes"]
                ]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{files.index} does not say what lies where: {error}"
                "  -> it was not saved by this project; do not use it"
            ) from error
    return tensors


def _read(stored: StoredBox, dtype: torch.dtype, wanted: Box, values: Tensor) -> int:
    """Copy to ``values`` what of ``wanted`` is stored there; returns how many elements that is."""
    common = wanted.overlap(stored.box)
    if common is None:
        return 0
    width, first = stored.box.num_columns, common.column - stored.box.column
    rows_at_once = max(1, READ_NUMEL // width)
    target = values[:, common.column - wanted.column :][:, : common.num_columns]
    end = common.row + common.num_rows
    with stored.file.open("rb", buffering=0) as file:
        for row in range(common.row, end, rows_at_once):
            num_rows = min(rows_at_once, end - row)
            block = torch.empty(num_rows, width, dtype=dtype, pin_memory=values.is_cuda)
            file.seek(stored.offset + (row - stored.box.row) * width * dtype.itemsize)
            _fill(block, file)
            rows = target[row - wanted.row :][:num_rows]
            moved = block.to(values.device, non_blocking=True)  # torch reuses it when it has left
            rows.copy_(moved[:, first : first + common.num_columns])
    return common.numel


def _fill(block: Tensor, file: IO[bytes]) -> None:
    content = memoryview(block.view(torch.uint8).view(-1).numpy())  # type: ignore[arg-type]  # numpy's types lack it
    while len(content) > 0:
        num_bytes = file.readinto(content)  # type: ignore[attr-defined]  # typeshed has it on the classes only
        if not num_bytes:
            raise CheckpointError(f"{file.name} ends too early  -> restore it")
        content = content[num_bytes:]

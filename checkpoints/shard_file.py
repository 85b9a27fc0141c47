"""One rank's part of a checkpoint: ``rank_00003.bin`` holds bytes, ``rank_00003.json`` says whose.

    {"model.merger.fc1.bias": {"dtype": "float32", "shape": [512],
                               "boxes": [[offset in bytes, row, column, rows, columns], ...]}, ...}

``Snapshot`` copies what a rank holds to host memory, in the order of the file, and writes it from
there: nothing is gathered, and no rank has more of the state than its own part.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from triptych.checkpoints.direct_file import WRITE_BYTES, write_block, write_hashed
from triptych.checkpoints.layout import ShardFiles
from triptych.checkpoints.pieces import DTYPES, Piece, is_copy, placed_boxes, stored_shape
from triptych.data.hashed_files import HashedFile
from triptych.errors import CheckpointError
from triptych.models.sharding import ShardingTable
from triptych.parallel.device import HostBuffer
from triptych.parallel.mesh import Mesh

ALIGNED_BYTES = 16


class ShardIndex:
    """What lies where in a rank's file, as it grows."""

    def __init__(self, mesh: Mesh, table: ShardingTable) -> None:
        self._mesh, self._table = mesh, table
        self.tensors: dict[str, dict[str, Any]] = {}
        self.num_bytes = 0

    def place(self, pieces: Iterable[Piece]) -> Iterator[tuple[Tensor, int]]:
        """The values that this rank saves of ``pieces``, and their offsets in the file."""
        for piece in pieces:
            if is_copy(piece.name, self._mesh, self._table):
                continue
            for key, box, values in placed_boxes(piece, self._mesh, self._table):
                offset = -(-self.num_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
                tensor = self.tensors.setdefault(
                    key,
                    {
                        "dtype": str(values.dtype).removeprefix("torch."),
                        "shape": stored_shape(piece.name, piece.whole, self._mesh, self._table),
                        "boxes": [],
                    },
                )
                tensor["boxes"].append([offset, *box])
                self.num_bytes = offset + values.numel() * values.element_size()
                yield values, offset

    def write(self, files: ShardFiles) -> None:
        """Write it beside the bytes."""
        files.index.write_text(json.dumps(self.tensors) + "\n")


def write_streamed(folder: Path, pieces: Iterable[Piece], mesh: Mesh, table: ShardingTable) -> None:
    """Write both files of a rank, one piece after the other: none waits in memory.

    Raises:
        OSError: they cannot be written.
    """
    files, index = ShardFiles(folder, mesh.rank), ShardIndex(mesh, table)
    with files.content.open("wb", buffering=0) as file:
        for values, offset in index.place(pieces):
            file.seek(offset)
            _write_all(file, values.contiguous().view(-1).view(torch.uint8))
    index.write(files)


class Snapshot:
    """Copies of a rank's tensors as they are at one moment, in host memory.

    The memory stays for the next snapshot.
    """

    def __init__(self) -> None:
        self._buffer = HostBuffer()
        self._index: ShardIndex | None = None

    @property
    def num_bytes(self) -> int:
        """Of the file that ``write`` would write."""
        return len(self._buffer.content)

    def take(self, pieces: Iterable[Piece], mesh: Mesh, table: ShardingTable) -> None:
        """Copy what this rank saves of ``pieces``: a tensor may change as soon as this returns.

        The host waits for the device once.
        """
        self._index = ShardIndex(mesh, table)
        copies = list(self._index.place(pieces))
        self._buffer.fill(copies, self._index.num_bytes)

    def write(
        self, folder: Path, rank: int, go_on: Callable[[], None] = lambda: None
    ) -> dict[Path, HashedFile]:
        """Write both files, if every number is finite. Reads all of them first.

        Returns the one of bytes, which is on disk, with what it is known by.

        Args:
            folder: of the shards.
            rank: whose.
            go_on: called now and then; may end it by an error.

        Raises:
            CheckpointError: a number is not finite.
            OSError: it cannot be written.
        """
        assert self._index is not None, "nothing was taken"
        self._refuse_what_is_not_finite(self._index, go_on)
        files = ShardFiles(folder, rank)
        content = memoryview(self._buffer.content.numpy())  # type: ignore[arg-type]  # numpy's types lack it
        written = write_hashed(files.content, content, go_on)
        self._index.write(files)
        return {files.content: written}

    def _refuse_what_is_not_finite(self, index: ShardIndex, go_on: Callable[[], None]) -> None:
        for key, tensor in index.tensors.items():
            go_on()
            dtype = DTYPES[tensor["dtype"]]
            for offset, _, _, num_rows, num_columns in tensor["boxes"]:
                extremes = self._buffer.view(offset, num_rows * num_columns, dtype).aminmax()
                if not all(math.isfinite(extreme) for extreme in extremes):
                    raise CheckpointError(
                        f"{key} is not finite: such a model is never saved  -> resume from a "
                        "checkpoint of before, with a lower learning rate or other data"
                    )


def _write_all(file: IO[bytes], flat: Tensor) -> None:
    content = memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's types lack it
    while len(content) > 0:
        content = content[write_block(file, content[:WRITE_BYTES]) :]

"""One rank's part of a checkpoint: ``rank_00003.bin`` holds bytes, ``rank_00003.json`` says whose.

    {"model.merger.fc1.bias": {"dtype": "float32", "shape": [512],
                               "boxes": [[offset in bytes, row, column, rows, columns], ...]}, ...}

``Snapshot`` copies what a rank holds to host memory, in the order of the file, and writes it from
there: nothing is gathered, and no rank has more of the state than its own part.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from triptych.checkpoints.layout import ShardFiles
from triptych.checkpoints.pieces import Piece, is_copy, placed_boxes, stored_shape
from triptych.models.sharding import ShardingTable
from triptych.parallel.device import HostBuffer
from triptych.parallel.mesh import Mesh

ALIGNED_BYTES = 16
WRITE_BYTES = 1 << 24


class Snapshot:
    """Copies of a rank's tensors as they are at one moment, in host memory.

    The memory stays for the next snapshot.
    """

    def __init__(self) -> None:
        self._buffer = HostBuffer()
        self._tensors: dict[str, dict[str, Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Of the file that ``write`` would write."""
        return len(self._buffer.content)

    def take(self, pieces: Iterable[Piece], mesh: Mesh, table: ShardingTable) -> None:
        """Copy what this rank saves of ``pieces``: a tensor may change as soon as this returns.

        The host waits for the device once.
        """
        self._tensors = {}
        offset, copies = 0, []
        for piece in pieces:
            if is_copy(piece.name, mesh, table):
                continue
            for key, box, values in placed_boxes(piece, mesh, table):
                offset = -(-offset // ALIGNED_BYTES) * ALIGNED_BYTES
                tensor = self._tensors.setdefault(
                    key,
                    {
                        "dtype": str(values.dtype).removeprefix("torch."),
                        "shape": stored_shape(piece.name, piece.whole, mesh, table),
                        "boxes": [],
                    },
                )
                tensor["boxes"].append([offset, *box])
                copies.append((values, offset))
                offset += values.numel() * values.element_size()
        self._buffer.fill(copies, offset)

    def write(self, folder: Path, rank: int) -> None:
        """Write both files.

        Raises:
            OSError: it cannot be written.
        """
        files = ShardFiles(folder, rank)
        with files.content.open("wb", buffering=0) as file:
            content = memoryview(self._buffer.content.numpy())  # type: ignore[arg-type]  # numpy's types lack it
            while len(content) > 0:
                content = content[write_block(file, content[:WRITE_BYTES]) :]
        files.index.write_text(json.dumps(self._tensors) + "\n")


def write_block(file: IO[bytes], block: memoryview) -> int:
    """Write what the file takes of it; returns how many bytes that is."""
    return file.write(block)

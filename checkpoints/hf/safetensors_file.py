"""A safetensors file written in place, tensor by tensor in any order: none waits in memory.

    file = SafetensorsFile(path, {"a": (2, 3), "b": (5,)}, torch.bfloat16)
    file.write("b", tensor)

Source: https://huggingface.co/docs/safetensors (Format).
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
ALIGNED_BYTES = 8


class SafetensorsFile:
    """The header is written at once, the tensors as they come."""

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> None:
        """Make the file, as large as it will be.

        Args:
            path: of the file.
            shapes: of all tensors that will be in it, by name.
            dtype: of all of them.

        Raises:
            OSError: it cannot be written.
        """
        self._path, self._dtype = path, dtype
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + prod(shape) * dtype.itemsize
            self._offsets[name] = start
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % ALIGNED_BYTES)
        self._start = 8 + len(content)
        with path.open("wb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the dtype and the shape that were told.

        Raises:
            OSError: it cannot be written.
        """
        assert tensor.dtype == self._dtype
        flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        with self._path.open("r+b", buffering=0) as file:
            file.seek(self._start + self._offsets[name])
            content = memoryview(flat)  # type: ignore[arg-type]  # numpy's types lack it
            while len(content) > 0:
                content = content[file.write(content) :]

"""The shards of a checkpoint, read by what ``checkpoints/shard_file.py`` says of them alone."""

import json
from pathlib import Path

import torch


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """As the indices say, in a few lines and without our reader; each element is stored once."""
    tensors: dict[str, torch.Tensor] = {}
    for index in folder.glob("*.json"):
        content = bytearray(index.with_suffix(".bin").read_bytes())
        for key, told in json.loads(index.read_text()).items():
            whole = tensors.setdefault(key, torch.full(told["shape"], torch.nan))
            for offset, row, column, rows, columns in told["boxes"]:
                dtype = getattr(torch, told["dtype"])
                box = torch.frombuffer(content, dtype=dtype, count=rows * columns, offset=offset)
                place = whole.view(len(whole), -1)[row : row + rows, column : column + columns]
                assert place.isnan().all(), key
                place.copy_(box.view(rows, columns))
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors

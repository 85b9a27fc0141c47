"""The tensors of a Hugging Face folder by name, read piece by piece.

The files stay memory-mapped; nothing of a tensor is in memory before it is asked for. Pickles of
torch are read weights-only: they run no code.
"""

import json
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from triptych.errors import CheckpointError
from triptych.models.sharding import TensorSharding

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OPEN_CLIP, OPEN_CLIP_PICKLE = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
IN_ORDER = (SINGLE, INDEX, OPEN_CLIP, PICKLE, PICKLE_INDEX, OPEN_CLIP_PICKLE)
"""Of several, the first is read."""


class TensorInFile(Protocol):
    """A tensor that is not read yet; safetensors' slice."""

    def get_shape(self) -> list[int]:
        """Its full shape."""

    def __getitem__(self, index: Any) -> Tensor:
        """Read a piece."""


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor in a memory-mapped pickle, as safetensors' slices are."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        """Its full shape."""
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Read a piece."""
        piece: Tensor = self.tensor[index]
        return piece


def open_tensors(folder: Path) -> dict[str, TensorInFile]:
    """Every tensor of a folder, by the name that it has there.

    Raises:
        CheckpointError: there are no weights, or a file is missing or damaged.
    """
    tensors: dict[str, TensorInFile] = {}
    for path in _weight_files(folder):
        try:
            tensors |= _open_pickle(path) if path.suffix == ".bin" else _open_safetensors(path)
        except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tensors


def read_json(path: Path) -> Any:
    """The JSON object of a file beside the weights.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is no Hugging Face model: no {path.name}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error


def read_piece(
    tensor: TensorInFile, sharding: TensorSharding, blocks: int, tp_rank: int, tp: int
) -> Tensor:
    """What a tp rank needs of one of their tensors, read from the file and nothing more.

    Args:
        tensor: theirs.
        sharding: how tp shards ours.
        blocks: stacked along dim 0, each of which tp cuts by itself.
        tp_rank: which piece.
        tp: number of pieces.
    """
    if sharding is TensorSharding.REPLICATED or tp == 1:
        return tensor[:]
    size = tensor.get_shape()[1 if sharding is TensorSharding.COLUMNS else 0] // blocks
    assert size % tp == 0, "parallel.tp is validated"
    start, stop = tp_rank * size // tp, (tp_rank + 1) * size // tp
    if sharding is TensorSharding.COLUMNS:
        return tensor[:, start:stop]
    return torch.cat([tensor[i * size + start : i * size + stop] for i in range(blocks)])


def tensor_differences(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Every missing, unexpected and mis-shaped tensor, a line for all layers that share one."""
    return [
        *_grouped("missing", wanted.keys() - found.keys()),
        *_grouped("unexpected", found.keys() - wanted.keys()),
        *(
            f"mis-shaped: {name} is {found[name]}, the model has {wanted[name]}"
            for name in sorted(wanted.keys() & found.keys())
            if wanted[name] != found[name]
        ),
    ]


def by_pattern(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what they are without the number of their layer."""
    groups = defaultdict(list)
    for name in names:
        groups[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    return groups


def _grouped(problem: str, names: Iterable[str]) -> list[str]:
    return [
        f"{problem}: {group[0] if len(group) == 1 else f'{pattern} ({len(group)} of them)'}"
        for pattern, group in by_pattern(sorted(names)).items()
    ]


def _open_safetensors(path: Path) -> dict[str, TensorInFile]:
    file: Any = safe_open(path, framework="pt")
    return {name: file.get_slice(name) for name in file.keys()}


def _open_pickle(path: Path) -> dict[str, TensorInFile]:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: MappedTensor(tensor) for name, tensor in state.items()}


def _weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, one or several."""
    name = next((name for name in IN_ORDER if (folder / name).exists()), None)
    if name is None:
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise CheckpointError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; "
            f"found {', '.join(found[:8]) or 'nothing'}"
        )
    if not name.endswith(".json"):
        return [folder / name]
    weight_map = read_json(folder / name)["weight_map"]
    return [folder / part for part in sorted(set(weight_map.values()))]

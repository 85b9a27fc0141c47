"""Torch's ``.metadata`` and what else is pickled in a checkpoint, read without running its code.

A pickle may call anything by name, and a checkpoint may come from anywhere: that its hashes agree
says only that nobody changed it by accident. Torch reads tensors with weights-only unpickling, and
``.metadata`` with all of pickle's powers. Here ``.metadata`` may name torch's own descriptions of
tensors, and nothing else. ``BytesStorageMetadata`` is left out of them on purpose: torch unpickles
such values freely when they are loaded, and ours are tensors only.
"""

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException

from triptych.errors import CheckpointError

NAMES = {
    "torch": {"Size", *(name for name, v in vars(torch).items() if isinstance(v, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
"""Module -> what a ``.metadata`` may name of it: all that occurs in those that we write."""

REFUSED = re.compile(r"\.metadata names .* which describes no tensor|Weights only load failed")
"""How the errors of the two ways to read pickles begin."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What the pickle names, where it may."""
        if name in NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which describes no tensor")


def _load(file: IO[bytes]) -> Any:
    return _MetadataUnpickler(file).load()


# Every reader of torch's and of megatron-core's takes this for the pickle module; what else of it
# they might come to use fails.
filesystem.pickle = SimpleNamespace(load=_load, dump=pickle.dump)  # type: ignore[assignment,attr-defined]  # part of it


@contextlib.contextmanager
def refusing_code(path: Path) -> Iterator[None]:
    """Tell of a pickle in ``path`` that may not be read as a refusal.

    Raises:
        CheckpointError: it names what could run code; none of it has run.
    """
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        found = REFUSED.search(str(error))  # torch wraps errors of a rank in texts of its own
        if found is None:
            raise
        raise CheckpointError(
            f"{path} is refused: {found[0]}; nothing in it was run"
            "  -> it was not saved by this project, or was changed; do not use it"
        ) from error

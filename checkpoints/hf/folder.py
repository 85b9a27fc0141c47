"""Weights from a Hugging Face folder, one tensor at a time, whatever tp and pp.

    reader = HFReader(folder, model_config_from_hf(folder))
    piece = reader.read("language.decoder.layers.0.mlp.linear_fc1.weight", tp_rank=1, tp=4)

Opening a folder checks the names and shapes of all its tensors.
"""

from pathlib import Path

import torch
from torch import Tensor

from triptych.checkpoints.hf.name_table import HF_EMBEDDING, HF_HEAD, hub_name, name_table
from triptych.checkpoints.hf.tensor_files import open_tensors, read_piece, tensor_differences
from triptych.configs.model_schema import ModelConfig
from triptych.errors import CheckpointError


class HFReader:
    """Reads pieces of a Hugging Face folder. Its files stay memory-mapped.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not those of ``model``;
            lists every missing, unexpected and mis-shaped one.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._table = name_table(model)
        tensors = open_tensors(folder)
        self._slices = {hub_name(name): tensor for name, tensor in tensors.items()}
        self._check(folder, model)

    def read(self, name: str, tp_rank: int = 0, tp: int = 1) -> Tensor:
        """A tensor of ours, or a tp rank's piece of it, in the dtype it is stored in.

        Args:
            name: a global name, a key of ``name_table``.
            tp_rank: which piece.
            tp: number of pieces; divides heads, kv heads, MLP and vocabulary.
        """
        entry = self._table[name]
        blocks = entry.transform.blocks
        parts = [
            read_piece(self._slices[hf], entry.sharding, blocks, tp_rank, tp) for hf in entry.theirs
        ]
        return entry.transform.to_ours(parts)

    def _check(self, folder: Path, model: ModelConfig) -> None:
        wanted = {hf: shape for entry in self._table.values() for hf, shape in entry.theirs.items()}
        found = {name: tuple(part.get_shape()) for name, part in self._slices.items()}
        if model.language.tie_word_embeddings and self._head_is_embedding():
            del found[HF_HEAD]
        if problems := tensor_differences(wanted, found):
            raise CheckpointError(
                f"{folder} does not hold the tensors of model {model.name}:\n  "
                + "\n  ".join(problems)
            )

    def _head_is_embedding(self) -> bool:
        """Whether the folder holds the tied weight twice, as some tools save it."""
        head, embedding = self._slices.get(HF_HEAD), self._slices.get(HF_EMBEDDING)
        return head is not None and embedding is not None and torch.equal(head[:], embedding[:])

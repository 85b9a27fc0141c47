"""Weights from and to a Hugging Face folder, one tensor at a time, whatever tp and pp.

    reader = HFReader(folder, model_config_from_hf(folder))
    piece = reader.read("language.decoder.layers.0.mlp.linear_fc1.weight", tp_rank=1, tp=4)

    writer = HFWriter(folder, model)
    writer.add(name, full_tensor)
    writer.finish(tokenizer_folder, limits)

Opening a folder checks the names and shapes of all its tensors. Every parameter is added once, in
any order; after ``finish``, transformers loads the folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from triptych.checkpoints.hf.model_config import generation_config, hf_config, preprocessor_config
from triptych.checkpoints.hf.name_table import HF_EMBEDDING, HF_HEAD, hub_name, name_table
from triptych.checkpoints.hf.tensor_files import (
    INDEX,
    SINGLE,
    open_tensors,
    read_piece,
    tensor_differences,
)
from triptych.configs.model_schema import ModelConfig
from triptych.data.types import PixelLimits
from triptych.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


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


class HFWriter:
    """Writes a folder that ``Qwen2VLForConditionalGeneration.from_pretrained`` loads.

    Works under a temporary name; the folder appears when it is complete. Holds at most
    ``max_shard_bytes`` and one tensor in memory.

    Raises:
        CheckpointError: the folder is there already, or transformers cannot express the model.
    """

    def __init__(
        self, folder: Path, model: ModelConfig, *, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        if folder.exists():
            raise CheckpointError(f"{folder} is there already -> name another, or remove it")
        self._folder = folder
        self._work = folder.with_name(f"{folder.name}.tmp")
        self._model = model
        self._config = hf_config(model)
        self._missing = name_table(model)
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        if self._work.exists():
            shutil.rmtree(self._work)
        self._work.mkdir(parents=True)

    def add(self, name: str, full: Tensor) -> None:
        """Take a tensor of ours at its full size (tp = 1); it may be changed or freed afterwards.

        Raises:
            CheckpointError: the model has no such tensor, it came before, or its shape is another.
        """
        entry = self._missing.pop(name, None)
        if entry is None:
            raise CheckpointError(f"{name} is no tensor of {self._model.name}, or came before")
        if tuple(full.shape) != entry.shape:
            raise CheckpointError(f"{name} is {tuple(full.shape)}, the model has {entry.shape}")
        if not entry.exported:
            return
        parts = entry.transform.to_theirs(full.detach().cpu())
        for theirs, part in zip(entry.theirs, parts, strict=True):
            if self._pending_bytes + part.nbytes > self._max_shard_bytes:
                self._write_shard()
            self._pending[theirs] = part.clone(memory_format=torch.contiguous_format)
            self._pending_bytes += part.nbytes

    def finish(self, tokenizer: Path, limits: PixelLimits) -> None:
        """Write what is not weights, and give the folder its name.

        Args:
            tokenizer: folder whose tokenizer files are copied.
            limits: image sizes that ``preprocessor_config.json`` states.

        Raises:
            CheckpointError: a tensor was not added, or there is no tokenizer.
        """
        if missing := [name for name, entry in self._missing.items() if entry.exported]:
            lines = "\n  ".join(tensor_differences({name: () for name in missing}, {}))
            raise CheckpointError(f"cannot finish the export of {self._model.name}:\n  {lines}")
        if not (tokenizer / "tokenizer_config.json").exists():
            raise CheckpointError(f"{tokenizer} holds no tokenizer_config.json")
        dtype = str(next(iter(self._pending.values())).dtype).removeprefix("torch.")
        self._write_shard()
        self._name_shards()
        self._write_json("config.json", {**self._config, "torch_dtype": dtype})
        self._write_json("generation_config.json", generation_config(self._model))
        self._write_json("preprocessor_config.json", preprocessor_config(self._model, limits))
        self._copy_tokenizer(tokenizer)
        self._work.rename(self._folder)

    def _copy_tokenizer(self, tokenizer: Path) -> None:
        """Its files; and its chat template once more, where processors of transformers 5 look."""
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, self._work / name)
        settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
        template = settings.get("chat_template")
        if isinstance(template, str) and not list(self._work.glob("chat_template.*")):
            (self._work / "chat_template.jinja").write_text(template)

    def _write_shard(self) -> None:
        if not self._pending:
            return
        path = self._work / f"{len(self._shards)}.safetensors"
        path.touch()
        mode = path.stat().st_mode  # as the umask has it; safetensors lets nobody else read
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(mode)
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> None:
        """Now that their number is known, name the shards as transformers does, and index them."""
        count = len(self._shards)
        if count == 1:
            (self._work / "0.safetensors").rename(self._work / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self._work / f"{i}.safetensors").rename(self._work / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        self._write_json(INDEX, index)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self._work / name).write_text(json.dumps(content, indent=2) + "\n")

"""Weights to a Hugging Face folder, one tensor at a time, by one rank or by several.

    writer = HFWriter(folder, model, torch.bfloat16, ranks)
    for name, shape in writer.shapes.items():
        writer.add(name, full_tensor)
    told = writer.finish(tokenizer_folder, origin)

Each rank writes the files that fall to it. Every parameter is added once, in any order; after
``finish``, transformers loads the folder.
"""

import json
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.checkpoints.hf.cards import evaluation_card, model_card
from triptych.checkpoints.hf.model_config import (
    generation_config,
    hf_config,
    preprocessor_config,
    video_preprocessor_config,
)
from triptych.checkpoints.hf.name_table import TensorShape, name_table
from triptych.checkpoints.hf.origin import Origin
from triptych.checkpoints.hf.safetensors_file import SafetensorsFile
from triptych.checkpoints.hf.tensor_files import INDEX, SINGLE, tensor_differences
from triptych.checkpoints.hf.tokenizer_files import write_tokenizer
from triptych.configs.model_schema import ModelConfig
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, SingleProcess, on_every_rank, on_rank_0

MAX_SHARD_BYTES = 5_000_000_000


class HFWriter:
    """Writes a folder that ``Qwen2VLForConditionalGeneration.from_pretrained`` loads.

    Works under a temporary name; the folder appears when it is complete. Every rank must call the
    constructor and ``finish``.

    Raises:
        CheckpointError: on every rank: the folder is there already, or transformers cannot express
            the model.
    """

    def __init__(
        self,
        folder: Path,
        model: ModelConfig,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        *,
        max_shard_bytes: int | None = None,
    ) -> None:
        if folder.exists():
            raise CheckpointError(f"{folder} is there already -> name another, or remove it")
        self._config = hf_config(model) | {"torch_dtype": str(dtype).removeprefix("torch.")}
        self._folder, self._model, self.dtype = folder, model, dtype
        self._ranks = ranks or SingleProcess()
        self._work = folder.with_name(f"{folder.name}.tmp")
        self._table = {name: e for name, e in name_table(model).items() if e.exported}
        shards = self._split(max_shard_bytes or MAX_SHARD_BYTES)
        self._weight_map = {
            theirs: _file_name(i, len(shards))
            for i, names in enumerate(shards)
            for theirs in self._shapes(names)
        }
        on_rank_0(self._ranks, self._make_folder, os_error=CheckpointError)
        mine = range(self._ranks.rank, len(shards), self._ranks.world_size)
        self.shapes = {name: self._table[name].shape for i in mine for name in shards[i]}
        """What this rank has to add, by our names."""
        self._missing = set(self.shapes)
        self._files = {}
        for i in mine:
            file = _file_name(i, len(shards))
            self._files[file] = SafetensorsFile(self._work / file, self._shapes(shards[i]), dtype)

    def add(self, name: str, full: Tensor) -> None:
        """Write a tensor of ours at its full size (tp = 1).

        Raises:
            CheckpointError: it is no tensor of this rank's files, it came before, or its shape is
                another.
            OSError: it cannot be written.
        """
        if name not in self._missing:
            raise CheckpointError(f"{name} is no tensor of {self._model.name}, or came before")
        self._missing.remove(name)
        entry = self._table[name]
        if tuple(full.shape) != entry.shape:
            raise CheckpointError(f"{name} is {tuple(full.shape)}, the model has {entry.shape}")
        parts = entry.transform.to_theirs(full.detach().cpu())
        for theirs, part in zip(entry.theirs, parts, strict=True):
            self._files[self._weight_map[theirs]].write(theirs, part)

    def finish(self, tokenizer: Path, origin: Origin) -> str:
        """Write what is not weights, and give the folder its name.

        Args:
            tokenizer: folder whose tokenizer is taken.
            origin: what the folder says of itself, and the pixel limits in it.

        Returns:
            What is other than in ``tokenizer``, for people; empty where nothing is.

        Raises:
            CheckpointError: a tensor was not added, or there is no tokenizer.
        """
        on_every_rank(self._ranks, self._refuse_missing, os_error=CheckpointError)
        return on_rank_0(
            self._ranks, lambda: self._write_the_rest(tokenizer, origin), os_error=CheckpointError
        )

    def _write_the_rest(self, tokenizer: Path, origin: Origin) -> str:
        model, work = self._model, self._work
        told = write_tokenizer(
            tokenizer,
            work,
            is_base=origin.is_base,
            max_length=model.language.max_position_embeddings,
        )
        if len(set(self._weight_map.values())) > 1:
            num_bytes = sum(prod(shape) for shape in self._shapes(self._table).values())
            total = {"total_size": num_bytes * self.dtype.itemsize}
            self._write_json(INDEX, {"metadata": total, "weight_map": self._weight_map})
        end = model.tokens.endoftext if origin.is_base else model.tokens.im_end
        self._write_json("config.json", self._config | {"eos_token_id": end})
        self._write_json("generation_config.json", generation_config(model))
        self._write_json("preprocessor_config.json", preprocessor_config(model, origin.limits))
        videos = video_preprocessor_config(model, origin.limits.video)
        self._write_json("video_preprocessor_config.json", videos)
        (work / "README.md").write_text(model_card(self._folder.name, model, origin))
        (work / "EVALUATE.md").write_text(evaluation_card(self._folder, origin))
        work.rename(self._folder)
        return told

    def _make_folder(self) -> None:
        if self._work.exists():
            shutil.rmtree(self._work)
        self._work.mkdir(parents=True)

    def _split(self, max_shard_bytes: int) -> list[list[str]]:
        """Our names by file, in order; what becomes several tensors of theirs stays together."""
        shards: list[list[str]] = [[]]
        size = 0
        for name, entry in self._table.items():
            num_bytes = prod(entry.shape) * self.dtype.itemsize
            if shards[-1] and size + num_bytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += num_bytes
        return shards

    def _shapes(self, names: Sequence[str] | dict[str, Any]) -> dict[str, TensorShape]:
        """Their shapes of some of our tensors."""
        return {
            theirs: shape for name in names for theirs, shape in self._table[name].theirs.items()
        }

    def _refuse_missing(self) -> None:
        if self._missing:
            lines = "\n  ".join(tensor_differences({name: () for name in self._missing}, {}))
            raise CheckpointError(f"cannot finish the export of {self._model.name}:\n  {lines}")

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self._work / name).write_text(json.dumps(content, indent=2) + "\n")


def _file_name(number: int, count: int) -> str:
    """As transformers names the files of a folder."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

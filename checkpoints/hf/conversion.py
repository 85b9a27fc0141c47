"""Between our checkpoints and Hugging Face folders. Neither direction builds a model.

One weight at a time: under torchrun, every rank imports its own tensor-parallel piece of each, and
exports the files that fall to it.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from triptych.checkpoints.hf.folder import HFReader
from triptych.checkpoints.hf.folder_writer import HFWriter
from triptych.checkpoints.hf.model_config import model_config_from_hf
from triptych.checkpoints.hf.name_table import name_table
from triptych.checkpoints.hf.origin import Origin, licence_of, origin_of
from triptych.checkpoints.layout import CHECKPOINTS, CheckpointFolder, step_folders
from triptych.checkpoints.locate import locate
from triptych.checkpoints.model_file import read_model, write_model
from triptych.checkpoints.pieces import Piece, own_part
from triptych.checkpoints.run_state import WEIGHTS
from triptych.checkpoints.shard_file import write_streamed
from triptych.checkpoints.store import CheckpointStore
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.configs.model_schema import ModelConfig
from triptych.configs.problems import refusal
from triptych.configs.rules.parallel import check_split
from triptych.data.tokenizer import load_tokenizer
from triptych.errors import CheckpointError, ConfigError
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import ShardingTable
from triptych.parallel.agree import on_every_rank
from triptych.parallel.mesh import Mesh, build_mesh, init_distributed

TIMEOUT_S = 600


class Exported(NamedTuple):
    """What was exported, and what a person should know of it."""

    checkpoint: Path
    origin: Origin
    told: str
    """What is other than in the tokenizer's folder; empty where nothing is."""


def import_hf(source: Path, output: Path) -> Path:
    """Write the weights of a Hugging Face folder as a checkpoint for ``init.checkpoint=``.

    Every rank must call this. Each holds its piece of one tensor at a time.

    Args:
        source: a folder with config.json and safetensors; config.json decides the sizes.
        output: a folder that gets ``checkpoints/``.

    Returns:
        The committed checkpoint.

    Raises:
        CheckpointError: not a Qwen2-VL model, its tensors are not those of its config.json, or
            ``output`` has checkpoints.
        ConfigError: the number of ranks does not divide what tensor parallelism splits.
    """
    root = output / CHECKPOINTS
    if others := step_folders(root):
        raise CheckpointError(f"{others[0]} is there already -> name another folder")
    model = model_config_from_hf(source)
    _refuse_foreign_tokens(source, model)
    reader = HFReader(source, model)
    tp = init_distributed(TIMEOUT_S)
    if problems := list(check_split(model, tp, "--nproc-per-node")):
        raise refusal(problems)
    mesh = build_mesh(tp, 1, seed=0, timeout_s=TIMEOUT_S)
    table = name_table(model)

    def pieces() -> Iterator[Piece]:
        for name, entry in table.items():
            if entry.exported:
                yield from own_part(WEIGHTS, {name: reader.read(name, mesh.tp_rank, tp)}, mesh)

    writer = CheckpointStore(root, mesh.world).begin(0)

    def write() -> None:
        write_streamed(writer.folder.shards, pieces(), mesh, sharding_table(model))
        if mesh.is_main:
            write_model(writer.folder.model, model)

    on_every_rank(mesh.world, write, os_error=CheckpointError)
    info = {"stage": "imported", "from": source.name, "licence": licence_of(source)}
    return writer.commit(info)


def export_hf(
    source: Path, output: Path, tokenizer: Path, dtype: torch.dtype | None = None
) -> Exported:
    """Write a checkpoint's weights as a folder that transformers loads, one tensor at a time.

    Every rank must call this; each writes its part of the files.

    Args:
        source: a run folder, its ``checkpoints``, or one checkpoint.
        output: a new folder.
        tokenizer: a tokenizer folder, taken along.
        dtype: of the weights that are written; by default the one they are stored in.

    Raises:
        CheckpointError: no good checkpoint, ``output`` exists, or a model that transformers cannot
            express.
        ConfigError: no tokenizer, or one with other ids of the special tokens than the model's.
    """
    init_distributed(TIMEOUT_S)
    mesh = build_mesh(1, 1, seed=0, timeout_s=TIMEOUT_S)
    folder = locate(source, mesh.world)
    model = read_model(folder)
    _refuse_other_tokenizer(tokenizer, model)
    stored = StoredTensors.open(CheckpointFolder(folder).shards, mesh.world)
    writer = HFWriter(output, model, dtype or stored.weights_dtype, mesh.world)
    origin, sharding = origin_of(folder), sharding_table(model)

    def write() -> None:
        for name, shape in writer.shapes.items():
            writer.add(name, stored_weight(stored, name, shape, writer.dtype, mesh, sharding))

    on_every_rank(mesh.world, write, os_error=CheckpointError)
    return Exported(folder, origin, writer.finish(tokenizer, origin))


def stored_weight(
    stored: StoredTensors,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mesh: Mesh,
    table: ShardingTable,
) -> Tensor:
    """One whole weight of a checkpoint, rounded to ``dtype``. No collective; ``mesh`` has tp 1."""
    weight = torch.empty(shape, dtype=dtype)
    stored.read([Piece(WEIGHTS, name, weight, 0, weight.view(-1))], mesh, table)
    return weight


def _refuse_foreign_tokens(source: Path, model: ModelConfig) -> None:
    """Without its tokenizer a model gets the ids of the Qwen2 vocabulary, maybe beyond its own."""
    largest, vocab_size = max(asdict(model.tokens).values()), model.language.vocab_size
    if largest >= vocab_size:
        raise CheckpointError(
            f"{source}: the special tokens have ids up to {largest}, beyond vocab_size={vocab_size}"
            " -> put the model's own tokenizer.json into the folder"
        )


def _refuse_other_tokenizer(tokenizer: Path, model: ModelConfig) -> None:
    """Before the weights are written: it may take an hour."""
    theirs, ours = asdict(load_tokenizer(tokenizer).tokens), asdict(model.tokens)
    problems = [
        f"<|{name}|> is {theirs[name]}, the model has {value}"
        for name, value in ours.items()
        if theirs[name] != value
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ConfigError(f"{tokenizer} is the tokenizer of another model:\n  {listed}")

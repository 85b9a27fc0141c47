"""Between our checkpoints and Hugging Face folders. Neither direction builds a model.

Under torchrun, every rank imports its own tensor-parallel piece of each weight; the export is one
process, one weight at a time.
"""

from dataclasses import asdict
from pathlib import Path

import torch

from triptych.checkpoints.hf.folder import HFReader, HFWriter
from triptych.checkpoints.hf.model_config import model_config_from_hf
from triptych.checkpoints.hf.name_table import name_table
from triptych.checkpoints.layout import CHECKPOINTS, CheckpointFolder, step_folders
from triptych.checkpoints.locate import locate
from triptych.checkpoints.model_file import read_model
from triptych.checkpoints.pieces import own_part
from triptych.checkpoints.run_state import WEIGHTS
from triptych.checkpoints.shard_file import Snapshot
from triptych.checkpoints.store import CheckpointStore
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.configs.compose import read_config
from triptych.configs.model_schema import ModelConfig
from triptych.configs.problems import refusal
from triptych.configs.rules.parallel import check_split
from triptych.configs.schema import DataConfig
from triptych.data.tokenizer import load_tokenizer
from triptych.data.types import PixelLimits
from triptych.errors import CheckpointError, ConfigError
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.parallel.agree import SingleProcess, on_every_rank
from triptych.parallel.mesh import build_mesh, init_distributed

TIMEOUT_S = 600


def import_hf(source: Path, output: Path) -> Path:
    """Write the weights of a Hugging Face folder as a checkpoint for ``init.checkpoint=``.

    Every rank must call this. Together they hold the whole model twice, in its dtype.

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
    weights = {
        name: reader.read(name, mesh.tp_rank, tp)
        for name, entry in name_table(model).items()
        if entry.exported
    }
    writer = CheckpointStore(root, mesh.world).begin(0)
    snapshot = Snapshot()
    snapshot.take(own_part(WEIGHTS, weights, mesh), mesh, sharding_table(model))
    on_every_rank(
        mesh.world,
        lambda: snapshot.write(writer.folder.shards, mesh.rank),
        os_error=CheckpointError,
    )
    writer.describe(model)
    return writer.commit({"stage": "imported", "from": source.name})


def export_hf(
    source: Path, output: Path, tokenizer: Path, dtype: torch.dtype | None = None
) -> Path:
    """Write a checkpoint's weights as a folder that transformers loads, one tensor at a time.

    Args:
        source: a run folder, its ``checkpoints``, or one checkpoint.
        output: a new folder.
        tokenizer: a tokenizer folder, copied along.
        dtype: of the weights that are written; by default the one they are stored in.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: no good checkpoint, ``output`` exists, or a model that transformers cannot
            express.
        ConfigError: no tokenizer, or one with other ids of the special tokens than the model's.
    """
    folder = locate(source, SingleProcess())
    model = read_model(folder)
    _refuse_other_tokenizer(tokenizer, model)
    writer = HFWriter(output, model)
    init_distributed(TIMEOUT_S)
    mesh = build_mesh(1, 1, seed=0, timeout_s=TIMEOUT_S)
    sharding = sharding_table(model)
    stored = StoredTensors.open(CheckpointFolder(folder).shards, mesh.world)
    for name, entry in name_table(model).items():
        if not entry.exported:
            continue
        weight = torch.empty(entry.shape, dtype=stored.weights_dtype)
        stored.read_whole(WEIGHTS, {name: weight}, mesh, sharding)
        writer.add(name, weight.to(dtype or stored.weights_dtype))
    writer.finish(tokenizer, _limits_of(folder))
    return folder


def _limits_of(folder: Path) -> PixelLimits:
    """What the run that saved the checkpoint made of its images; Qwen's own, if it was imported."""
    config = CheckpointFolder(folder).config
    data = read_config(config).data if config.is_file() else DataConfig()
    return PixelLimits(data.min_pixels, data.max_pixels)


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

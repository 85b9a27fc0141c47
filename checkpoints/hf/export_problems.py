"""Whether an exported folder is what a checkpoint says: every tensor, every setting.

    problems = [*weight_problems(exported, checkpoint, mesh), *file_problems(exported, checkpoint)]

Two tensors at a time are in memory, the exported one and ours. Nothing is run.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.checkpoints.hf.conversion import stored_weight
from triptych.checkpoints.hf.model_config import (
    generation_config,
    hf_config,
    preprocessor_config,
    video_preprocessor_config,
)
from triptych.checkpoints.hf.name_table import HF_HEAD, hub_name, name_table
from triptych.checkpoints.hf.origin import origin_of
from triptych.checkpoints.hf.tensor_files import (
    TensorInFile,
    open_tensors,
    read_json,
    tensor_differences,
)
from triptych.checkpoints.hf.tokenizer_files import CHATS, SETTINGS, ends_of, rendered, template_of
from triptych.checkpoints.layout import CheckpointFolder
from triptych.checkpoints.model_file import read_model
from triptych.checkpoints.pieces import stored_keys
from triptych.checkpoints.run_state import WEIGHTS
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.data.tokenizer import CHAT_TEMPLATE
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.parallel.mesh import Mesh

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
ROWS_AT_ONCE = 4096


def weight_problems(exported: Path, checkpoint: Path, mesh: Mesh) -> Iterator[str]:
    """Every tensor that is on one side only, of another shape, or of other bits.

    Args:
        exported: a Hugging Face folder.
        checkpoint: a good one.
        mesh: of one process.

    Raises:
        CheckpointError: either cannot be read.
    """
    model = read_model(checkpoint)
    table = {name: entry for name, entry in name_table(model).items() if entry.exported}
    found = {hub_name(name): tensor for name, tensor in open_tensors(exported).items()}
    wanted = {theirs: shape for entry in table.values() for theirs, shape in entry.theirs.items()}
    if model.language.tie_word_embeddings and HF_HEAD in found:
        yield f"{HF_HEAD} is there, but the head is the embedding: it is in the folder twice"
        del found[HF_HEAD]
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
    yield from tensor_differences(wanted, shapes)
    sharding = sharding_table(model)
    stored = StoredTensors.open(CheckpointFolder(checkpoint).shards, mesh.world)
    keys = set(chain.from_iterable(stored_keys(WEIGHTS, name, sharding) for name in table))
    ours = {key for key in stored.shapes if key.startswith(f"{WEIGHTS}.")}
    for key in sorted(keys ^ ours):
        yield f"{key} is {'not ' if key in keys else ''}in the checkpoint, but no other side has it"
    for name, entry in table.items():
        theirs = [part for part in entry.theirs if shapes.get(part) == wanted[part]]
        if not theirs or keys - ours:
            continue
        dtype = found[theirs[0]][:1].dtype
        if dtype not in BITS:
            yield f"{theirs[0]} is {dtype}; an export has {' or '.join(map(str, BITS))}"
            continue
        weight = stored_weight(stored, name, entry.shape, dtype, mesh, sharding)
        parts = dict(zip(entry.theirs, entry.transform.to_theirs(weight), strict=True))
        for part in theirs:
            if count := _num_different(found[part], parts[part]):
                total = parts[part].numel()
                yield f"{part}: {count:,} of {total:,} elements are not those of {name}"


def _num_different(found: TensorInFile, wanted: Tensor) -> int:
    """Elements whose bits differ; a few rows of ``found`` are read at a time."""
    count, bits = 0, BITS[wanted.dtype]
    for start in range(0, len(wanted), ROWS_AT_ONCE):
        rows = found[start : start + ROWS_AT_ONCE]
        if rows.dtype != wanted.dtype:
            return wanted.numel()
        ours = wanted[start : start + ROWS_AT_ONCE].contiguous()
        count += int((rows.contiguous().view(bits) != ours.view(bits)).sum())
    return count


def file_problems(exported: Path, checkpoint: Path) -> Iterator[str]:
    """Every setting beside the weights that is not that of training.

    Raises:
        CheckpointError: a file is missing or no JSON.
    """
    model, origin = read_model(checkpoint), origin_of(checkpoint)
    ends = ends_of(is_base=origin.is_base)
    end = model.tokens.endoftext if origin.is_base else model.tokens.im_end
    expected: dict[str, dict[str, Any]] = {
        "config.json": hf_config(model) | {"eos_token_id": end},
        "generation_config.json": generation_config(model),
        "preprocessor_config.json": preprocessor_config(model, origin.limits),
        "video_preprocessor_config.json": video_preprocessor_config(model, origin.limits.video),
        SETTINGS: {**ends, "padding_side": "left"},
    }
    for name, settings in expected.items():
        found = read_json(exported / name)
        for key, value in settings.items():
            if found.get(key) != value:
                yield f"{name}: {key}={json.dumps(found.get(key))}, should be {json.dumps(value)}"
    template = template_of(exported)
    for what in CHATS:
        if rendered(template, what) != rendered(CHAT_TEMPLATE, what):
            yield f"the chat template renders {what} otherwise than training did"

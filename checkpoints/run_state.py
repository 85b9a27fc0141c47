"""All that a run needs to go on.

Weights, optimizer state, random states and a few numbers, saved and loaded together.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.checkpoints.environment import write_environment
from triptych.checkpoints.layout import CheckpointFolder
from triptych.checkpoints.metadata_pickle import refusing_code
from triptych.checkpoints.model_file import differences
from triptych.checkpoints.sharded import (
    Tensors,
    check_tensors,
    load_tensors,
    save_tensors,
    stored_keys,
    stored_shapes,
    tensor_problems,
)
from triptych.configs.model_schema import ModelConfig
from triptych.errors import CheckpointError
from triptych.models.sharding import ShardingTable
from triptych.parallel.agree import on_every_rank
from triptych.parallel.device import HAS_CUDA, random_states, set_random_states
from triptych.parallel.mesh import Mesh
from triptych.parallel.zero.protocol import STATE_KINDS, ParamState, ShardedOptimizer

WEIGHTS = "model"


@dataclass(frozen=True, slots=True)
class RunTensors:
    """What a run's tensors are, under the names of ``models.parameters.global_parameters``."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: ShardedOptimizer | None
    """None where only weights matter: conversion and sampling."""
    sharding: ShardingTable
    mesh: Mesh


def save_state(folder: CheckpointFolder, run: RunTensors, numbers: Mapping[str, Any]) -> None:
    """Write everything into a folder that the store has begun. Every rank must call this.

    Args:
        folder: of a ``CheckpointWriter``.
        run: the tensors.
        numbers: plain JSON; comes back from ``load_numbers``.

    Raises:
        CheckpointError: on every rank alike, where some could not write; names them.
    """
    kinds: dict[str, Tensors] = {WEIGHTS: run.parameters}
    num_updates: dict[str, int] = {}
    if run.optimizer is not None:
        run.optimizer.gather_weights()
        state = run.optimizer.state_by_param()
        num_updates = run.optimizer.num_updates
        for kind in STATE_KINDS:
            kinds[kind] = {name: tensors[kind] for name, tensors in state.items()}
    save_tensors(folder.shards, kinds, run.mesh, run.sharding)

    def write_the_rest() -> None:
        random_state = io.BytesIO()  # written at once, a full disk is an OSError
        torch.save(_random_state(), random_state)
        folder.random_state(run.mesh.rank).write_bytes(random_state.getvalue())
        if run.mesh.is_main:
            content = json.dumps({**numbers, "num_updates": num_updates}, indent=1)
            folder.numbers.write_text(content + "\n")
            write_environment(folder.environment, run.mesh)

    on_every_rank(run.mesh.world, write_the_rest, os_error=CheckpointError)


def save_weights(folder: CheckpointFolder, run: RunTensors) -> None:
    """Write the weights only, as ``save_state`` does. Every rank must call this.

    Raises:
        CheckpointError: on every rank alike, where some could not write; names them.
    """
    if run.optimizer is not None:
        run.optimizer.gather_weights()
    save_tensors(folder.shards, {WEIGHTS: run.parameters}, run.mesh, run.sharding)


def load_numbers(folder: Path) -> dict[str, Any]:
    """The numbers that ``save_state`` was given, and ``num_updates``.

    Raises:
        CheckpointError: it has weights only, as one that was imported.
    """
    path = CheckpointFolder(folder).numbers
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has weights only, no position in the data and no optimizer state"
            "  -> init.checkpoint=FOLDER starts from it, with init.optimizer_state=false"
        )
    numbers: dict[str, Any] = json.loads(path.read_text())
    return numbers


def refuse_other_model(folder: Path, model: ModelConfig, run: RunTensors) -> None:
    """Compare the checkpoint's model and its tensors with this run's. Every rank must call this.

    Raises:
        CheckpointError: on every rank; lists every difference of the two.
    """
    kinds = {WEIGHTS: run.parameters}
    problems = differences(folder, model)
    shards = CheckpointFolder(folder).shards
    problems += tensor_problems(shards, kinds, run.mesh, run.sharding, strict=WEIGHTS)
    if problems:
        raise CheckpointError(
            f"{folder} is of another model:\n  "
            + "\n  ".join(problems)
            + "\n  -> name the model and sizes that it has (its model.json), or another checkpoint"
        )


def load_weights(folder: Path, run: RunTensors) -> None:
    """Load the weights only; the optimizer starts afresh from them. Every rank must call this.

    The model is that of the checkpoint: ``refuse_other_model`` comes before, or it was built by the
    checkpoint's ``model.json``.
    """
    load_tensors(CheckpointFolder(folder).shards, {WEIGHTS: run.parameters}, run.mesh, run.sharding)
    if run.optimizer is not None:
        run.optimizer.refresh_master_weights()


def load_optimizer(folder: Path, run: RunTensors, *, partly: bool) -> None:
    """Load optimizer state, after the weights. Every rank must call this.

    Args:
        folder: the checkpoint.
        run: the tensors; its optimizer is filled.
        partly: a parameter without stored state starts afresh, as one does that was frozen before.

    Raises:
        CheckpointError: state of a parameter that trains is missing, and not ``partly``.
    """
    assert run.optimizer is not None
    shards = CheckpointFolder(folder).shards
    state = {name: _empty_state(p) for name, p in run.parameters.items() if p.requires_grad}
    if partly:
        stored = stored_shapes(shards)
        state = {
            name: tensors
            for name, tensors in state.items()
            if stored_keys(STATE_KINDS[0], name, run.sharding)[0] in stored
        }
    kinds = {kind: {name: t[kind] for name, t in state.items()} for kind in STATE_KINDS}
    strict = None if partly else STATE_KINDS[0]
    check_tensors(shards, kinds, run.mesh, run.sharding, strict=strict)
    load_tensors(shards, kinds, run.mesh, run.sharding)
    run.optimizer.load_state_by_param(state, load_numbers(folder)["num_updates"])


def load_random_state(folder: Path, mesh: Mesh) -> bool:
    """Restore this rank's random state.

    False, and nothing changed, where another number of ranks or other devices wrote it.
    """
    checkpoint = CheckpointFolder(folder)
    if checkpoint.num_random_states != mesh.dims.world_size:
        return False
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    file = checkpoint.random_state(mesh.rank)
    with refusing_code(file):
        state = torch.load(file, map_location="cpu", weights_only=True)
    if HAS_CUDA != ("cuda" in state):
        return False
    set_random_states(state)
    get_cuda_rng_tracker().set_states(state["megatron"])
    return True


def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    own, megatron = random_states(), get_cuda_rng_tracker().get_states()
    return {"cpu": own.pop("cpu"), "megatron": megatron, **own}


def _empty_state(parameter: nn.Parameter) -> ParamState:
    """In host memory: 12 bytes per element are more than a device has room for."""
    return {kind: torch.empty(parameter.shape) for kind in STATE_KINDS}

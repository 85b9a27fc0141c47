"""All that a run needs to go on.

Weights, optimizer state, random states and a few numbers, saved and loaded together.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from triptych.checkpoints.environment import write_environment
from triptych.checkpoints.layout import CheckpointFolder
from triptych.checkpoints.model_file import differences, write_model
from triptych.checkpoints.pieces import Piece, own_part, stored_keys
from triptych.checkpoints.shard_file import Snapshot
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.checkpoints.tensor_problems import tensor_problems
from triptych.configs.compose import save_config
from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import Config
from triptych.data.hashed_files import HashedFile
from triptych.errors import CheckpointError
from triptych.models.sharding import ShardingTable
from triptych.parallel.device import random_states, set_random_states
from triptych.parallel.mesh import Mesh
from triptych.parallel.zero.protocol import STATE_KINDS, ShardedOptimizer, StateShard

WEIGHTS = "model"
TRACKER = "megatron."
"""Before the names of megatron-core's own random states."""


@dataclass(frozen=True, slots=True)
class RunTensors:
    """What a run's tensors are, under the names of ``models.parameters.global_parameters``."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: ShardedOptimizer | None
    """None where only weights matter: conversion and sampling."""
    sharding: ShardingTable
    mesh: Mesh


def pieces_to_save(run: RunTensors) -> Iterator[Piece]:
    """This rank's part of optimizer state and weights. Every rank must call this."""
    if run.optimizer is not None:
        run.optimizer.gather_weights()
        yield from _state_pieces(run, run.optimizer.state_shards())
    yield from own_part(WEIGHTS, run.parameters, run.mesh)


def weights_to_save(run: RunTensors) -> Iterator[Piece]:
    """This rank's part of the weights only. Every rank must call this."""
    if run.optimizer is not None:
        run.optimizer.gather_weights()
    yield from own_part(WEIGHTS, run.parameters, run.mesh)


class RunSnapshot:
    """A run's state at one moment, in host memory: a rank's part, and on rank 0 what is of all.

    The memory, the size of this rank's part, stays for the next snapshot.
    """

    def __init__(self, run: RunTensors, config: Config) -> None:
        self._run, self._config = run, config
        self._shards = Snapshot()
        self._random_state: bytes | None = None
        self._numbers: dict[str, Any] = {}

    @property
    def num_bytes(self) -> int:
        """What it will take on disk, but for small files."""
        return self._shards.num_bytes

    def take(self, numbers: Mapping[str, Any]) -> None:
        """Copy all that a run needs to go on. Every rank must call this.

        Args:
            numbers: plain JSON; comes back from ``load_numbers``.
        """
        run = self._run
        self._shards.take(pieces_to_save(run), run.mesh, run.sharding)
        self._random_state = _random_state()
        num_updates = {} if run.optimizer is None else dict(run.optimizer.num_updates)
        self._numbers = {**numbers, "num_updates": num_updates}

    def take_weights(self) -> None:
        """Copy the weights only. Every rank must call this."""
        self._shards.take(weights_to_save(self._run), self._run.mesh, self._run.sharding)

    def write(
        self, folder: CheckpointFolder, go_on: Callable[[], None] = lambda: None
    ) -> dict[Path, HashedFile]:
        """Write it into a folder that the store has begun; no collective.

        Returns the big files, which are on disk, with what each is known by.

        Raises:
            CheckpointError: a number is not finite.
            OSError: it cannot be written.
        """
        mesh = self._run.mesh
        written = self._shards.write(folder.shards, mesh.rank, go_on)
        if self._random_state is not None:
            folder.random_state(mesh.rank).write_bytes(self._random_state)
        if mesh.is_main:
            write_model(folder.model, self._config.model)
            save_config(self._config, folder.config)
            if self._random_state is not None:
                folder.numbers.write_text(json.dumps(self._numbers, indent=1) + "\n")
                write_environment(folder.environment, mesh)
        return written


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
    stored = _stored(folder, run)
    problems += tensor_problems(stored, kinds, run.mesh, run.sharding, strict=WEIGHTS)
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
    _stored(folder, run).read_whole(WEIGHTS, run.parameters, run.mesh, run.sharding)
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
    stored = _stored(folder, run)
    trained = {name: p for name, p in run.parameters.items() if p.requires_grad}
    if partly:
        trained = {
            name: parameter
            for name, parameter in trained.items()
            if stored_keys(STATE_KINDS[0], name, run.sharding)[0] in stored.shapes
        }
    kinds = dict.fromkeys(STATE_KINDS, trained)
    strict = None if partly else STATE_KINDS[0]
    if problems := tensor_problems(stored, kinds, run.mesh, run.sharding, strict=strict):
        raise CheckpointError(f"{folder} is of another model:\n  " + "\n  ".join(problems))
    shards = {n: shard for n, shard in run.optimizer.state_shards().items() if n in trained}
    stored.read(_state_pieces(run, shards), run.mesh, run.sharding)
    run.optimizer.take_over_updates(trained, load_numbers(folder)["num_updates"])


def load_random_state(folder: Path, mesh: Mesh) -> bool:
    """Restore this rank's random state.

    False, and nothing changed, where another number of ranks or other devices wrote it.
    """
    checkpoint = CheckpointFolder(folder)
    if checkpoint.num_random_states != mesh.dims.world_size:
        return False
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    file = checkpoint.random_state(mesh.rank)
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} holds no random states: {error}  -> it was not saved by this project"
        ) from error
    trackers = {key: state.pop(key) for key in list(state) if key.startswith(TRACKER)}
    if state.keys() != random_states().keys():
        return False
    set_random_states(state)
    states = {key.removeprefix(TRACKER): value for key, value in trackers.items()}
    get_cuda_rng_tracker().set_states(states)
    return True


def _random_state() -> bytes:
    """As safetensors."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    trackers = get_cuda_rng_tracker().get_states().items()
    content: bytes = save(random_states() | {f"{TRACKER}{name}": s for name, s in trackers})
    return content


def _stored(folder: Path, run: RunTensors) -> StoredTensors:
    return StoredTensors.open(CheckpointFolder(folder).shards, run.mesh.world)


def _state_pieces(run: RunTensors, shards: Mapping[str, StateShard]) -> Iterator[Piece]:
    for name, (start, tensors) in shards.items():
        for kind, values in tensors.items():
            yield Piece(kind, name, run.parameters[name], start, values)

"""Model and sharded optimizer of this rank, built from the configuration of a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from triptych.checkpoints.run_state import RunTensors
from triptych.configs.schema import Config, Zero
from triptych.costs.layer_split import layers_per_chunk
from triptych.models.build import build_model
from triptych.models.parameters import global_parameters, part_of
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import ShardingTable
from triptych.parallel.mesh import Mesh
from triptych.parallel.zero.protocol import ShardedOptimizer
from triptych.train.stages.parameter_counts import (
    ParameterCounts,
    check_trained_parts,
    count_parameters,
)
from triptych.train.stages.stage import Stage


@dataclass(frozen=True, slots=True)
class Engine:
    """What trains. Weights are set by ``train.start``."""

    mesh: Mesh
    stage: Stage
    bare_chunks: Sequence[nn.Module]
    """This rank's chunks of the model, without the wrapping."""
    parameters: Mapping[str, nn.Parameter]
    optimizer: ShardedOptimizer
    parameter_counts: ParameterCounts
    sharding: ShardingTable
    """How the parameters lie over the ranks."""

    @property
    def chunks(self) -> Sequence[nn.Module]:
        """This rank's chunks of the model, wrapped for data parallelism."""
        return self.optimizer.chunks

    @property
    def tensors(self) -> RunTensors:
        """What a checkpoint holds."""
        return RunTensors(self.parameters, self.optimizer, self.sharding, self.mesh)


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """Every rank must call this.

    Pipeline split, tensor and sequence parallelism, recomputation and dtype are the model's; then
    the stage freezes; then data parallelism and ZeRO-1 wrap what trains.
    """
    chunks = build_model(
        config.model,
        config.parallel,
        config.train.precision,
        layers_per_chunk(config),
        mesh,
        config.train.kernels,
    )
    parameters = dict(global_parameters(chunks))
    stage = Stage(config.stage)
    stage.freeze(parameters)
    sharding = sharding_table(config.model)
    counts = count_parameters(parameters, sharding, mesh)
    check_trained_parts(stage, counts)
    parts = {name: part_of(name).value for name in parameters}
    zero = _zero_of(config.optimizer.zero)
    overlap, precision = config.parallel.overlap, config.train.precision
    optimizer = zero(chunks, parameters, parts, config.optimizer, overlap, precision, mesh)
    return Engine(mesh, stage, chunks, parameters, optimizer, counts, sharding)


def _zero_of(choice: Zero) -> Callable[..., ShardedOptimizer]:
    """The optimizer's class; importing DeepSpeed takes seconds, so only who asks for it pays."""
    if choice is Zero.deepspeed:
        from triptych.parallel.zero.deepspeed import DeepSpeedZero

        return DeepSpeedZero
    from triptych.parallel.zero.megatron import MegatronZero

    return MegatronZero

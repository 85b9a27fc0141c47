"""Model and sharded optimizer of this rank, built from the configuration of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from triptych.checkpoints.run_state import RunTensors
from triptych.configs.schema import Config, ParallelConfig, Zero
from triptych.costs.layer_split import layers_per_chunk
from triptych.models.build import build_model
from triptych.models.kernels import Installed, Kernel, KernelTable, choose_grad_sum, choose_here
from triptych.models.parameters import global_parameters, part_of
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import ShardingTable
from triptych.parallel.data_parallel import DataParallelModel, wrap_chunks
from triptych.parallel.mesh import Mesh, tp_ranks_read_each_other
from triptych.parallel.zero.protocol import ShardedOptimizer
from triptych.train.console import say
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
    chunks: Sequence[nn.Module]
    """The same, wrapped for data parallelism."""
    kernels: KernelTable
    """Which kernels the model runs on."""
    parameters: Mapping[str, nn.Parameter]
    optimizer: ShardedOptimizer
    parameter_counts: ParameterCounts
    sharding: ShardingTable
    """How the parameters lie over the ranks."""

    @property
    def tensors(self) -> RunTensors:
        """What a checkpoint holds."""
        return RunTensors(self.parameters, self.optimizer, self.sharding, self.mesh)


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """Every rank must call this.

    Pipeline split, tensor and sequence parallelism, recomputation and dtype are the model's; then
    the stage freezes; then data parallelism and ZeRO-1 wrap what trains.
    """
    precision, zero = config.train.precision, config.optimizer.zero
    kernels = choose_here(config.train.kernels, precision)
    layers = layers_per_chunk(config)
    parallel = _without_what_cannot_run(config.parallel, mesh)
    chunks = build_model(config.model, parallel, precision, layers, mesh, kernels)
    parameters = dict(global_parameters(chunks))
    stage = Stage(config)
    stage.freeze(parameters)
    sharding = sharding_table(config.model)
    counts = count_parameters(parameters, sharding, mesh)
    check_trained_parts(stage, counts)
    parts = {name: part_of(name).value for name in parameters}
    grad_sum = choose_grad_sum(config.train.kernels, Installed.here())
    wrapped = wrap_chunks(
        chunks,
        zero,
        config.parallel.overlap,
        sums_in_product=grad_sum.kernel is Kernel.APEX_PRODUCT,
    )
    model = DataParallelModel(wrapped, parameters, parts)
    return Engine(
        mesh=mesh,
        stage=stage,
        bare_chunks=chunks,
        chunks=wrapped,
        kernels=kernels,
        parameters=parameters,
        optimizer=_zero_of(zero)(model, config.optimizer, precision, mesh),
        parameter_counts=counts,
        sharding=sharding,
    )


def _without_what_cannot_run(parallel: ParallelConfig, mesh: Mesh) -> ParallelConfig:
    """Symmetric memory overlaps tp communication, and needs devices that read each other's memory.

    Every rank must call this.
    """
    overlap = parallel.overlap
    if not overlap.tp_comm or tp_ranks_read_each_other(mesh):
        return parallel
    say(
        "parallel.overlap.tp_comm is left out: the devices of a tp group cannot read each other's "
        "memory (no NVLink)  -> parallel.overlap.tp_comm=false says the same"
    )
    return replace(parallel, overlap=replace(overlap, tp_comm=False))


def _zero_of(choice: Zero) -> type[ShardedOptimizer]:
    """The optimizer's class; importing DeepSpeed takes seconds, so only who asks for it pays."""
    if choice is Zero.deepspeed:
        from triptych.parallel.zero.deepspeed import DeepSpeedZero

        return DeepSpeedZero
    from triptych.parallel.zero.megatron import MegatronZero

    return MegatronZero

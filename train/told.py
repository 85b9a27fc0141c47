"""What a run says of itself on the terminal, before it trains and at its end."""

import torch

from triptych.configs.schema import Config
from triptych.costs.layer_split import layers_per_chunk, planned_bubble
from triptych.models.kernels import Installed, choose_adam, choose_grad_sum
from triptych.parallel.mesh import Mesh
from triptych.train.console import say
from triptych.train.data import Mixture
from triptych.train.engine import Engine
from triptych.train.state import TrainState
from triptych.train.stop import StopReason


def introduce(config: Config, engine: Engine, data: Mixture) -> None:
    """Say what runs, on what, by which kernels, on which data."""
    mesh, dims, layers = engine.mesh, engine.mesh.dims, layers_per_chunk(config)
    packs, seq_len = config.train.global_batch_size, config.train.seq_len
    paragraphs = [
        f"{config.stage.name} of {config.model.name} -> {config.run.dir}",
        f"ranks: {dims.world_size} = tp {dims.tp} x pp {dims.pp} x dp {dims.dp}; "
        f"decoder layers by {'stage' if config.parallel.vpp == 1 else 'chunk'}: "
        f"{', '.join(map(str, layers))} (ViT on the first)"
        f"{_bubble(config, mesh)}",
        f"step: {packs} packs x {seq_len} tokens = {packs * seq_len:,} at most, "
        f"of a budget of {config.stage.token_budget:,}",
        engine.stage.cut_short(),
        f"{config.train.precision.name}; threads per rank: {torch.get_num_threads()}; kernels:\n"
        f"{_kernels(config, engine)}",
        f"data: {data}\n{engine.parameter_counts}",
    ]
    say("\n".join(filter(None, paragraphs)))


def _bubble(config: Config, mesh: Mesh) -> str:
    """What the pipeline's stages are expected to wait for each other, where there are several."""
    if config.parallel.pp == 1:
        return ""
    packs_per_microbatch = mesh.dims.dp * config.train.micro_batch_size
    num_microbatches = config.train.global_batch_size // packs_per_microbatch
    return f"; {planned_bubble(config, num_microbatches=num_microbatches)}"


def _kernels(config: Config, engine: Engine) -> str:
    installed = Installed.here()
    grad_sum = choose_grad_sum(config.train.kernels, installed)
    adam = choose_adam(config.optimizer.zero, installed)
    rows = [*engine.kernels.rows(), ("grad_sum", grad_sum), ("adam", adam)]
    return "\n".join(
        f"  {name:<10} {choice.kernel.value} ({choice.reason})" for name, choice in rows
    )


def stopped(config: Config, state: TrainState, reasons: list[tuple[int, StopReason]]) -> str:
    """Who asked for it."""
    told = "; ".join(f"rank {rank}: {reason.text}" for rank, reason in reasons)
    return (
        f"{config.stage.name} stops after step {state.step}, as asked by {told}"
        "  -> type the command again: the run resumes"
    )


def finished(config: Config, state: TrainState) -> str:
    """What was used up."""
    used = f"{state.consumed_tokens:,} of {config.stage.token_budget:,} tokens"
    if state.consumed_tokens >= config.stage.token_budget:
        return f"{config.stage.name} is finished: its budget is used up, {used}, {state.step} steps"
    if config.train.num_steps is None or state.step < config.train.num_steps:
        return (
            f"{config.stage.name} is finished: data.order, or every source's max_epochs, is used "
            f"up, {used}, {state.step} steps"
        )
    return (
        f"{config.stage.name} is finished: train.num_steps={config.train.num_steps} reached, {used}"
        "  -> a larger train.num_steps goes on from here, another run.dir starts anew"
    )

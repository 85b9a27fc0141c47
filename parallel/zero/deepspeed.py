"""ZeRO-1 by DeepSpeed's stage 1 optimizer, used bare: no engine, megatron-core's schedule.

megatron-core accumulates fp32 gradients over the microbatches and sums those of sequence
parallelism and tied embeddings; DeepSpeed reduces them over dp, clips, and updates its shards. Its
norm walks over parameter groups with a collective for each, so every rank has the same groups:
where a rank holds nothing of one, a single zero stands in.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from triptych.configs.schema import PARTS, OptimizerConfig, Precision
from triptych.parallel.data_parallel import DataParallelModel
from triptych.parallel.device import BACKEND
from triptych.parallel.mesh import Mesh
from triptych.parallel.zero.protocol import (
    MOMENTS,
    STATE_KINDS,
    ShardedOptimizer,
    StateShard,
    fuses,
)

BUCKET_NUMEL = 50_000_000
"""Elements that are reduced, and gathered, in one message."""


class DeepSpeedZero(ShardedOptimizer):
    """The ShardedOptimizer over DeepSpeed's."""

    def __init__(
        self, model: DataParallelModel, config: OptimizerConfig, precision: Precision, mesh: Mesh
    ) -> None:
        """Shard the state of what trains; the arguments are those of ``ShardedOptimizer``."""
        super().__init__(model, config, precision, mesh)
        groups = _param_groups(model, config, mesh, self._dtype)
        parameter: Any
        for parameter in self._trained.values():
            parameter.ds_pipe_replicated = _is_copy(parameter, mesh)
        self._stand_ins = [g["params"][0] for g in groups if g["is_stand_in"]]
        self._zero = _sharded_adam(groups, self._trained, config, mesh)
        for hook in self._zero._grad_acc_hooks:
            hook.remove()  # gradients are handed over after the backward pass, not during it

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._model.zero_grad()
        self._zero.zero_grad()
        self._zero.averaged_gradients.clear()  # in bf16 DeepSpeed adds to them until it steps

    def squared_grad_norm(self, veto: Tensor | None = None) -> Tensor:
        """Reduce the gradients over dp; squared L2 norm of the whole model's.

        Every rank must call this.
        """
        parameter: Any
        for parameter in self._trained.values():
            # DeepSpeed averages over dp; ours is a sum already divided by the number of tokens.
            self._hand_over(parameter, parameter.main_grad.mul_(self._mesh.dims.dp))
        for stand_in in self._stand_ins:
            self._hand_over(stand_in, torch.zeros_like(stand_in, dtype=torch.float32))
        self._zero.reduce_gradients(pipeline_parallel=True)
        return self._squared_norm(*self._counted_and_copies(), veto)

    def step(self, lr: Mapping[str, float], grad_norm: float) -> None:
        """Clip and update; ``squared_grad_norm()`` comes before. Every rank must call this."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr[group["part"]]
        self._zero.grad_norm = torch.tensor(grad_norm)
        self._zero.step()
        self._count_update()

    def local_grads(self) -> dict[str, Tensor]:
        """Reduced gradients by name, whole over dp. Every rank of ``dp_group`` must call this."""
        return {name: safe_get_full_grad(p).float() for name, p in self._trained.items()}

    def state_shards(self) -> dict[str, StateShard]:
        """What this rank owns of the state, by name; moments are zeros before the first update."""
        self._link_moments()
        shards = {}
        parameter: Any
        for name, parameter in self._trained.items():
            mapping = parameter._hp_mapping  # DeepSpeed's; None where this rank owns nothing of it
            if mapping is not None:
                moments = (mapping.get_hp_fragment(key).detach() for key in MOMENTS)
                tensors = (mapping.get_hp_fragment().detach(), *moments)
                start = mapping.lp_fragment_address.start
                shards[name] = StateShard(start, dict(zip(STATE_KINDS, tensors, strict=True)))
        return shards

    def take_over_updates(self, names: Iterable[str], num_updates: Mapping[str, int]) -> None:
        """Go on counting where whoever had the state of ``names`` stood; for their parts only."""
        self._link_moments()
        self._updates_of(names, num_updates)
        adam = self._zero.optimizer
        for group in adam.param_groups:
            for shard in group["params"]:
                adam.state[shard]["step"] = self._adam_step(group, shard)

    def gather_weights(self) -> None:
        """Nothing to wait for: weights are gathered within ``step``."""

    def refresh_master_weights(self) -> None:
        """Copy the model's weights to the master weights."""
        self._zero.refresh_fp32_params()

    def _counted_and_copies(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's shards of the gradient, those that another rank counts apart."""
        counted: list[Tensor] = []
        copies: list[Tensor] = []
        for group, shards in self._zero.averaged_gradients.items():
            grads = [shard for shard in shards if not getattr(shard, "_zero_padding", False)]
            parameters = self._zero.params_in_partition[group]
            # not strict: DeepSpeed does not mark all the padding that ends a group
            for grad, parameter in zip(grads, parameters, strict=False):
                is_tp_copy = self._mesh.tp_rank > 0 and not is_model_parallel_parameter(parameter)
                is_copy = is_tp_copy or getattr(parameter, "ds_pipe_replicated", False)
                (copies if is_copy else counted).append(grad)
        return counted, copies

    def _adam_step(self, group: Mapping[str, Any], shard: Tensor) -> Tensor:
        """Where torch's fused AdamW wants it: beside the weights."""
        return torch.tensor(float(self.num_updates[group["part"]]), device=shard.device)

    def _link_moments(self) -> None:
        """Let DeepSpeed find the moments of each parameter, zeros where there are none yet.

        DeepSpeed links them by itself after the first group's first step, too early for the others.
        """
        adam = self._zero.optimizer
        for group in adam.param_groups:
            for shard in group["params"]:
                if "exp_avg" not in adam.state[shard]:
                    adam.state[shard] = {key: torch.zeros_like(shard) for key in MOMENTS}
                    adam.state[shard]["step"] = self._adam_step(group, shard)
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _hand_over(self, parameter: Tensor, grad: Tensor) -> None:
        if self._zero.use_grad_accum_attribute:
            parameter.grad_accum = grad  # type: ignore[attr-defined]  # DeepSpeed's name
        else:
            parameter.grad = grad


class _ToldTheNorm(DeepSpeedZeroOptimizer):
    """DeepSpeed's, which would compute the norm again to clip, and wait for every group's."""

    grad_norm: Tensor
    """0-d fp32, in host memory."""

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """The norm that it was told."""
        return self.grad_norm


def _param_groups(
    model: DataParallelModel, config: OptimizerConfig, mesh: Mesh, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One group for each part, with and without weight decay; the same list on every rank."""
    return [
        {
            "params": members or [nn.Parameter(torch.zeros(1, device=mesh.device, dtype=dtype))],
            "part": part,
            "weight_decay": config.weight_decay if decays else 0.0,
            "is_stand_in": not members,
        }
        for part in PARTS
        for decays, members in _by_decay(
            parameter for name, parameter in model.trained.items() if model.parts[name] == part
        )
    ]


def _by_decay(parameters: Iterator[nn.Parameter]) -> list[tuple[bool, list[nn.Parameter]]]:
    """Matrices decay; biases and norm weights do not."""
    members = list(parameters)
    return [(decays, [p for p in members if (p.dim() > 1) == decays]) for decays in (True, False)]


def _is_copy(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """The last stage's copy of a tied embedding, which the norm must not count again."""
    shared = bool(getattr(parameter, "shared_embedding", False))
    return shared and not mesh.is_first_pp_stage


def _sharded_adam(
    groups: list[dict[str, Any]],
    trained: Mapping[str, nn.Parameter],
    config: OptimizerConfig,
    mesh: Mesh,
) -> _ToldTheNorm:
    deepspeed_logger.setLevel(logging.WARNING)
    if mesh.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # else a CPU collective is compiled for a minute
    deepspeed.init_distributed(dist_backend=BACKEND, auto_mpi_discovery=False, verbose=False)
    adam = torch.optim.AdamW(
        groups,
        lr=1.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fuses(mesh.device) or None,
    )
    by_parameter = {parameter: name for name, parameter in trained.items()}
    by_parameter |= {
        g["params"][0]: f"stand-in for {g['part']}" for g in groups if g["is_stand_in"]
    }
    return _ToldTheNorm(
        adam,
        by_parameter,
        timers=NoopTimer(),
        optimizer_params={},
        dp_process_group=mesh.dp_group,
        mpu=_model_parallel_unit(mesh),
        clip_grad=config.clip_grad,
        partition_grads=False,
        contiguous_gradients=False,
        overlap_comm=False,
        reduce_bucket_size=BUCKET_NUMEL,
        allgather_bucket_size=BUCKET_NUMEL,
        gradient_accumulation_dtype=torch.float32,
        communication_data_type=torch.float32,
        check_grad_overflow=False,
        verbose=False,
    )


def _model_parallel_unit(mesh: Mesh) -> SimpleNamespace:
    """What DeepSpeed calls an mpu. Without one, its norm under tp is silently wrong."""
    return SimpleNamespace(
        get_model_parallel_group=lambda: mesh.model_group,
        get_model_parallel_world_size=lambda: dist.get_world_size(mesh.model_group),
        get_model_parallel_rank=lambda: dist.get_rank(mesh.model_group),
        get_tensor_model_parallel_rank=lambda: mesh.tp_rank,
        get_tensor_model_parallel_world_size=lambda: mesh.dims.tp,
        get_data_parallel_group=lambda: mesh.dp_group,
    )

"""ZeRO-1 by megatron-core's DistributedOptimizer.

Reduce-scatter of gradients, all-gather of parameters.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.configs.schema import OptimizerConfig, Precision
from triptych.parallel.mesh import Mesh
from triptych.parallel.zero import MOMENTS, PARTS, ParamState

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer import (
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate


class MegatronZero:
    """The ShardedOptimizer over megatron-core's DDP buffers.

    Every rank must build it, also one where nothing trains. Parameters that are frozen at this
    moment stay frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, nn.Parameter],
        parts: Mapping[str, str],
        config: OptimizerConfig,
        precision: Precision,
        mesh: Mesh,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: this rank's piece, with ``requires_grad`` set.
            names: its parameters by global name.
            parts: the part of each name; each part has its own learning rate.
            config: betas, eps, decay and clipping.
            precision: of weights and activations; gradients and state are fp32.
            mesh: this rank's place.
        """
        self._mesh = mesh
        self._clip = config.clip_grad
        self._trained = {name: p for name, p in names.items() if p.requires_grad}
        transformer: Any = model.config
        self.model = DistributedDataParallel(
            transformer,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False
            ),
            model,
        )
        transformer.finalize_model_grads_func = finalize_model_grads
        self._chain = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=1.0,  # set at each step
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=precision is Precision.bf16,
                params_dtype=torch.bfloat16 if precision is Precision.bf16 else torch.float32,
                use_distributed_optimizer=True,
            ),
            [self.model],
            config_overrides=_param_groups(
                {id(p): parts[name] for name, p in names.items()}, config.weight_decay
            ),
            use_gloo_process_groups=False,
        )
        self._optimizers = [o for o in self._chain.chained_optimizers if not o.is_stub_optimizer]
        self.num_updates = 0

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad_buffer()
        self._chain.zero_grad()

    def grad_norm(self) -> float:
        """L2 norm of the whole model's gradient. Every rank must call this."""
        self._chain.prepare_grads()
        return float(self._chain.get_grad_norm())

    def step(self, lr: Mapping[str, float], grad_norm: float) -> None:
        """Clip and update; ``grad_norm()`` comes before. Every rank must call this."""
        for group in self._chain.param_groups:
            group["lr"] = lr[group["part"]]
        for optimizer in self._optimizers:
            parameters = optimizer.get_parameters()
            if self._clip > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, self._clip, grad_norm)
        self._chain.step_with_ready_grads()
        self.num_updates += 1

    def local_grads(self) -> dict[str, Tensor]:
        """Reduced gradients by name, whole over dp. Every rank of ``dp_group`` must call this."""
        return {
            name: self._gather(parameter, parameter.main_grad.flatten()[start:end], start)
            for name, parameter, start, end, _ in self._shards()
        }

    def state_by_param(self) -> dict[str, ParamState]:
        """Master weights and Adam's moments by name, whole over dp.

        Every rank of ``dp_group`` must call this.
        """
        gathered: dict[str, ParamState] = {}
        for name, parameter, start, _, inner in self._shards():
            shard = {"master": None} | dict.fromkeys(MOMENTS)
            if inner is not None:
                adam, main = inner
                state = adam.state[main]
                shard = {"master": main.data} | {
                    key: state.get(key, torch.zeros_like(main)) for key in MOMENTS
                }
            gathered[name] = {
                key: self._gather(parameter, value, start) for key, value in shard.items()
            }
        return gathered

    def load_state_by_param(self, state: Mapping[str, ParamState], num_updates: int) -> None:
        """Take over the state of the named parameters; the others start from zero moments."""
        self.num_updates = num_updates
        for name, _, start, end, inner in self._shards():
            if inner is None:
                continue
            adam, main = inner
            tensors = {
                key: value.flatten()[start:end] for key, value in state.get(name, {}).items()
            }
            if tensors:
                main.data.copy_(tensors["master"])
            moments = {
                key: tensors[key].to(main).clone() if tensors else torch.zeros_like(main)
                for key in MOMENTS
            }
            adam.state[main] = moments
            if isinstance(adam, torch.optim.AdamW):
                adam.state[main]["step"] = torch.tensor(float(num_updates))
        if num_updates:
            for optimizer in self._optimizers:
                _set_fused_step(optimizer.optimizer, num_updates)

    def refresh_master_weights(self) -> None:
        """Copy the model's weights to the master weights."""
        self._chain.reload_model_params()

    def _shards(
        self,
    ) -> Iterator[tuple[str, Any, int, int, tuple[torch.optim.Optimizer, Tensor] | None]]:
        """Each trained parameter, the range that this dp rank owns, its Adam and master shard.

        In one order on all ranks of ``dp_group``; (0, 0, None) where this rank owns nothing of a
        parameter.
        """
        owned = {}
        for optimizer in self._optimizers:
            for parameter, (group, index) in optimizer.model_param_group_index_map.items():
                shard = optimizer._get_model_param_range_map(parameter)["param"]  # no public name
                main = optimizer.optimizer.param_groups[group]["params"][index]
                owned[id(parameter)] = (shard.start, shard.end, (optimizer.optimizer, main))
        for name, parameter in self._trained.items():
            start, end, inner = owned.get(id(parameter), (0, 0, None))
            yield name, parameter, start, end, inner

    def _gather(self, parameter: Tensor, shard: Tensor | None, start: int) -> Tensor:
        """The whole tensor, from the pieces of all dp ranks.

        A sum in which each element is not zero on one rank only.
        """
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if shard is not None and shard.numel():
            whole[start : start + shard.numel()] = shard.detach().flatten()
        if self._mesh.dims.dp > 1:
            dist.all_reduce(whole, group=self._mesh.dp_group)
        return whole.view(parameter.shape)


def _param_groups(
    part_by_id: Mapping[int, str], weight_decay: float
) -> dict[ParamKey, dict[str, Any]]:
    """One group for each part, with and without weight decay."""

    def in_group(part: str, decays: bool) -> ParamWithNamePredicate:
        return ParamWithNamePredicate(
            name=f"{part}-{decays}",
            fn=lambda p, _: part_by_id[id(p)] == part and (p.dim() > 1) == decays,
        )

    return {
        ParamKey(with_name_predicate=in_group(part, decays)): {
            "part": part,
            # not wd_mult: only megatron-core's own scheduler would apply that
            "weight_decay": weight_decay if decays else 0.0,
        }
        for part in PARTS
        for decays in (True, False)
    }


def _set_fused_step(adam: torch.optim.Optimizer, step: int) -> None:
    """Apex's and Transformer Engine's FusedAdam count steps by group instead of by parameter."""
    if not isinstance(adam, torch.optim.AdamW):
        for group in adam.param_groups:
            group["step"] = step

"""ZeRO-1 by megatron-core's DistributedOptimizer.

Reduce-scatter of gradients, all-gather of parameters.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from triptych.configs.schema import PARTS, OptimizerConfig, Precision
from triptych.parallel.data_parallel import DataParallelModel
from triptych.parallel.mesh import Mesh
from triptych.parallel.zero.gather import gather_whole
from triptych.parallel.zero.protocol import (
    MOMENTS,
    STATE_KINDS,
    ShardedOptimizer,
    StateShard,
    fuses,
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


class MegatronZero(ShardedOptimizer):
    """The ShardedOptimizer over megatron-core's DDP buffers."""

    def __init__(
        self, model: DataParallelModel, config: OptimizerConfig, precision: Precision, mesh: Mesh
    ) -> None:
        """Shard the state of what trains; the arguments are those of ``ShardedOptimizer``."""
        super().__init__(model, config, precision, mesh)
        self._overlaps_gather: bool = model.chunks[0].ddp_config.overlap_param_gather
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
                params_dtype=self._dtype,
                use_distributed_optimizer=True,
                overlap_param_gather=self._overlaps_gather,
            ),
            list(model.chunks),
            config_overrides=_param_groups(model, config.weight_decay),
            use_gloo_process_groups=False,
        )
        self._optimizers = [o for o in self._chain.chained_optimizers if not o.is_stub_optimizer]
        for optimizer in self._optimizers:
            if fuses(mesh.device):
                _fuse(optimizer.optimizer)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._model.zero_grad()
        self._chain.zero_grad()

    def squared_grad_norm(self, veto: Tensor | None = None) -> Tensor:
        """Squared L2 norm of the whole model's gradient. Every rank must call this."""
        self._chain.prepare_grads()
        counted = [g for o in self._optimizers for g in o.get_main_grads_for_grad_norm()]
        known = {id(grad) for grad in counted}
        grads = (main.grad for o in self._optimizers for main in o.get_parameters())
        copies = [grad for grad in grads if grad is not None and id(grad) not in known]
        return self._squared_norm(counted, copies, veto)

    def step(self, lr: Mapping[str, float], grad_norm: float) -> None:
        """Clip and update; ``squared_grad_norm()`` comes before. Every rank must call this."""
        for group in self._chain.param_groups:
            group["lr"] = lr[group["part"]]
        for optimizer in self._optimizers:
            parameters = optimizer.get_parameters()
            if self._config.clip_grad > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, self._config.clip_grad, grad_norm)
        self._chain.step_with_ready_grads()
        self._count_update()

    def local_grads(self) -> dict[str, Tensor]:
        """Reduced gradients by name, whole over dp. Every rank of ``dp_group`` must call this."""
        shards = list(self._shards())
        pieces = (
            (parameter, parameter.main_grad.flatten()[start:end], start)
            for _, parameter, start, end, _ in shards
        )
        whole = gather_whole(pieces, self._mesh)
        return {name: next(whole) for name, *_ in shards}

    def state_shards(self) -> dict[str, StateShard]:
        """What this rank owns of the state, by name; moments are zeros before the first update."""
        shards = {}
        for name, _, start, _, inner in self._shards():
            if inner is None:
                continue
            adam, main = inner
            if not adam.state[main]:
                adam.state[main] = {key: torch.zeros_like(main) for key in MOMENTS}
                if isinstance(adam, torch.optim.AdamW):
                    adam.state[main]["step"] = self._adam_step(name, main)
            moments = (adam.state[main][key] for key in MOMENTS)
            shards[name] = StateShard(
                start, dict(zip(STATE_KINDS, (main.detach(), *moments), strict=True))
            )
        return shards

    def take_over_updates(self, names: Iterable[str], num_updates: Mapping[str, int]) -> None:
        """Go on counting where whoever had the state of ``names`` stood; for their parts only."""
        self._updates_of(names, num_updates)
        for name, *_, inner in self._shards():
            if inner is not None and "step" in inner[0].state[inner[1]]:
                inner[0].state[inner[1]]["step"] = self._adam_step(name, inner[1])
        for optimizer in self._optimizers:
            _set_fused_steps(optimizer.optimizer, self.num_updates)

    def gather_weights(self) -> None:
        """Wait for the updated weights of the other ranks.

        Every rank of ``dp_group`` must call this.
        """
        if self._overlaps_gather:
            for chunk in self._model.chunks:
                chunk.start_param_sync(force_sync=True)

    def refresh_master_weights(self) -> None:
        """Copy the model's weights to the master weights."""
        self._chain.reload_model_params()

    def _adam_step(self, name: str, main: Tensor) -> Tensor:
        """Where torch's fused AdamW wants it: beside the weights."""
        return torch.tensor(float(self.num_updates[self._model.parts[name]]), device=main.device)

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


def _param_groups(model: DataParallelModel, weight_decay: float) -> dict[ParamKey, dict[str, Any]]:
    """One group for each part, with and without weight decay."""
    part_by_id = {id(p): model.parts[name] for name, p in model.parameters.items()}

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


def _fuse(adam: torch.optim.Optimizer) -> None:
    """Torch's own AdamW, where megatron-core found no other, in its one kernel for all weights."""
    if isinstance(adam, torch.optim.AdamW):
        for group in adam.param_groups:
            group.update(fused=True, foreach=False)


def _set_fused_steps(adam: torch.optim.Optimizer, num_updates: Mapping[str, int]) -> None:
    """Apex's and Transformer Engine's FusedAdam count steps by group instead of by parameter."""
    if not isinstance(adam, torch.optim.AdamW):
        for group in adam.param_groups:
            if num_updates[group["part"]]:
                group["step"] = num_updates[group["part"]]

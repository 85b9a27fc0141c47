"""ZeRO-1 by megatron-core's DistributedOptimizer.

Reduce-scatter of gradients, all-gather of parameters.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triptych.configs.schema import PARTS, OptimizerConfig, OverlapConfig, Precision
from triptych.parallel.dtypes import DTYPES
from triptych.parallel.mesh import Mesh
from triptych.parallel.zero.gather import gather_whole
from triptych.parallel.zero.protocol import FUSED, MOMENTS, STATE_KINDS, ParamState

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
        chunks: Sequence[nn.Module],
        names: Mapping[str, nn.Parameter],
        parts: Mapping[str, str],
        config: OptimizerConfig,
        overlap: OverlapConfig,
        precision: Precision,
        mesh: Mesh,
    ) -> None:
        """Wrap ``chunks``.

        Args:
            chunks: this rank's pieces of the model, with ``requires_grad`` set.
            names: their parameters by global name.
            parts: the part of each name; each part has its own learning rate.
            config: betas, eps, decay and clipping.
            overlap: whether gradients and weights travel while something is computed.
            precision: of weights and activations; gradients and state are fp32.
            mesh: this rank's place.
        """
        self._mesh = mesh
        self._clip = config.clip_grad
        self._overlaps_gather = overlap.param_gather
        self._trained = {name: p for name, p in names.items() if p.requires_grad}
        self._parts = parts
        self.chunks: Sequence[Any] = [_data_parallel(chunk, overlap) for chunk in chunks]
        _finish_by_megatron(self.chunks, overlap)
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
                params_dtype=DTYPES[precision],
                use_distributed_optimizer=True,
                overlap_param_gather=overlap.param_gather,
            ),
            self.chunks,
            config_overrides=_param_groups(
                {id(p): parts[name] for name, p in names.items()}, config.weight_decay
            ),
            use_gloo_process_groups=False,
        )
        self._optimizers = [o for o in self._chain.chained_optimizers if not o.is_stub_optimizer]
        for optimizer in self._optimizers:
            _fuse(optimizer.optimizer)
        self.num_updates = dict.fromkeys(PARTS, 0)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
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
        self.num_updates = {part: count + 1 for part, count in self.num_updates.items()}

    def local_grads(self) -> dict[str, Tensor]:
        """Reduced gradients by name, whole over dp. Every rank of ``dp_group`` must call this."""
        shards = list(self._shards())
        pieces = (
            (parameter, parameter.main_grad.flatten()[start:end], start)
            for _, parameter, start, end, _ in shards
        )
        whole = gather_whole(pieces, self._mesh)
        return {name: next(whole) for name, *_ in shards}

    def state_by_param(self, names: Container[str] | None = None) -> dict[str, ParamState]:
        """Master weights and Adam's moments by name, whole over dp.

        Every rank of ``dp_group`` must call this.
        """
        wanted = [shard for shard in self._shards() if names is None or shard[0] in names]
        pieces = (
            (parameter, piece, start)
            for _, parameter, start, _, inner in wanted
            for piece in _state_of(inner)
        )
        whole = gather_whole(pieces, self._mesh)
        return {name: {kind: next(whole) for kind in STATE_KINDS} for name, *_ in wanted}

    def load_state_by_param(
        self, state: Mapping[str, ParamState], num_updates: Mapping[str, int]
    ) -> None:
        """Take over the state of the named parameters; that of the others stays."""
        self.num_updates |= {self._parts[name]: num_updates[self._parts[name]] for name in state}
        for name, _, start, end, inner in self._shards():
            if inner is None or name not in state:
                continue
            adam, main = inner
            shard = {key: value.flatten()[start:end] for key, value in state[name].items()}
            main.data.copy_(shard["master"])
            adam.state[main] = {key: shard[key].to(main).clone() for key in MOMENTS}
            if isinstance(adam, torch.optim.AdamW):
                step = float(self.num_updates[self._parts[name]])
                adam.state[main]["step"] = torch.tensor(step, device=main.device)
        for optimizer in self._optimizers:
            _set_fused_steps(optimizer.optimizer, self.num_updates)

    def gather_weights(self) -> None:
        """Wait for the updated weights of the other ranks.

        Every rank of ``dp_group`` must call this.
        """
        if self._overlaps_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

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


def _state_of(inner: tuple[torch.optim.Optimizer, Tensor] | None) -> list[Tensor | None]:
    """This rank's pieces, in the order of ``STATE_KINDS``; None stands for zeros or for nothing."""
    if inner is None:
        return [None for _ in STATE_KINDS]
    adam, main = inner
    return [main.data, *(adam.state[main].get(key) for key in MOMENTS)]


def _data_parallel(chunk: nn.Module, overlap: OverlapConfig) -> DistributedDataParallel:
    transformer: Any = chunk.config
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
    )
    return DistributedDataParallel(transformer, config, chunk)


def _finish_by_megatron(chunks: Sequence[DistributedDataParallel], overlap: OverlapConfig) -> None:
    """What megatron-core's schedule calls when gradients are to be reduced, or not yet.

    It asks the first chunk's configuration.
    """
    transformer: Any = chunks[0].config
    transformer.finalize_model_grads_func = finalize_model_grads
    if overlap.grad_reduce:
        # a list is for several chunks only
        no_sync = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


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


def _fuse(adam: torch.optim.Optimizer) -> None:
    """Torch's own AdamW, where megatron-core found no other, in its one kernel for all weights."""
    if FUSED and isinstance(adam, torch.optim.AdamW):
        for group in adam.param_groups:
            group.update(fused=True, foreach=False)


def _set_fused_steps(adam: torch.optim.Optimizer, num_updates: Mapping[str, int]) -> None:
    """Apex's and Transformer Engine's FusedAdam count steps by group instead of by parameter."""
    if not isinstance(adam, torch.optim.AdamW):
        for group in adam.param_groups:
            if num_updates[group["part"]]:
                group["step"] = num_updates[group["part"]]

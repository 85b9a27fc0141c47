"""Process groups.

Who this rank is on each axis, and the collectives over an axis that training itself needs.
"""

import math
import os
import platform
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from triptych.parallel.agree import ProcessGroupRanks, Ranks, ranks_where
from triptych.parallel.device import (
    BACKEND,
    let_peers_work,
    local_device,
    reads_memory_of,
    share_gloo_sockets,
)


@dataclass(frozen=True, slots=True)
class Dims:
    """How many ranks each axis has.

    Ranks are ordered tp (fastest), dp, pp, as megatron-core orders them.
    """

    tp: int
    pp: int
    dp: int

    @classmethod
    def of(cls, world_size: int, tp: int, pp: int) -> "Dims":
        """The data-parallel degree is what is left of ``world_size`` (validated before)."""
        assert world_size % (tp * pp) == 0, f"{world_size=} is no multiple of {tp=} * {pp=}"
        return cls(tp=tp, pp=pp, dp=world_size // (tp * pp))

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp} dp={self.dp}"


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where a model chunk lies: along the pipeline, and across its tensor-parallel ranks."""

    number: int
    """From 0, among the pp * vpp chunks that the microbatches go through in order."""
    num_chunks: int
    """Chunks of the whole model."""
    vpp_rank: int | None
    """Which of its rank's chunks it is; None where a rank has one."""
    tp_rank: int
    tp: int

    @property
    def is_first(self) -> bool:
        """Holds ViT, merger and embedding: takes pixels and tokens."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Holds the head: takes labels, gives the loss."""
        return self.number == self.num_chunks - 1


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place, and its process groups (megatron-core's)."""

    dims: Dims
    world: Ranks
    """All ranks, to agree with over gloo: no device is waited for."""
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """All ranks that hold a piece of the same replica: tp x pp."""

    @property
    def is_first_pp_stage(self) -> bool:
        """Holds the ViT and the embedding."""
        return self.pp_rank == 0

    def places(self, vpp: int) -> list[ChunkPlace]:
        """The places of this rank's ``vpp`` model chunks, in the order in which it holds them."""
        pp = self.dims.pp
        return [
            ChunkPlace(
                number=vpp_rank * pp + self.pp_rank,
                num_chunks=vpp * pp,
                vpp_rank=vpp_rank if vpp > 1 else None,
                tp_rank=self.tp_rank,
                tp=self.dims.tp,
            )
            for vpp_rank in range(vpp)
        ]

    @property
    def axes(self) -> dict[str, dist.ProcessGroup]:
        """Its group along each axis."""
        return {"tp": self.tp_group, "pp": self.pp_group, "dp": self.dp_group}

    @property
    def reads_media(self) -> bool:
        """Reads and decodes for its tensor-parallel group.

        Tp rank 0 of the first pipeline stage.
        """
        return self.is_first_pp_stage and self.tp_rank == 0

    @property
    def media_reader(self) -> int:
        """The rank that reads for this rank's replica."""
        return self.dp_rank * self.dims.tp

    @property
    def is_main(self) -> bool:
        """Writes to the terminal and to shared files."""
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of a run meet, before any process group is there."""

    store: Any
    """Torch's, which its types do not name."""
    rank: int
    world_size: int


def meet(timeout_s: int) -> Meeting:
    """Find the other ranks by torchrun's environment, or be alone without it."""
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()  # no public name
        return Meeting(store, dist.get_rank(), dist.get_world_size())
    if "RANK" in os.environ:
        timeout = timedelta(seconds=timeout_s)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]  # not in its __all__
        # torchrun keeps its store when it restarts its ranks: they would find the addresses of
        # those before, and wait for them for ever
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]  # as above
        return Meeting(store, rank, world_size)
    return Meeting(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]  # as above


def init_distributed(timeout_s: int, meeting: Meeting | None = None) -> int:
    """Start the default process group, where there is none. Returns the world size."""
    if not dist.is_initialized():
        meeting = meeting or meet(timeout_s)
        let_peers_work()
        share_gloo_sockets()
        local_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(
            BACKEND,
            store=meeting.store,
            rank=meeting.rank,
            world_size=meeting.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    return dist.get_world_size()


def build_mesh(tp: int, pp: int, *, seed: int, timeout_s: int, vpp: int = 1) -> Mesh:
    """Make the process groups of this layout.

    Every rank must call this, after ``init_distributed``.
    """
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Mesh(
        dims=Dims.of(dist.get_world_size(), tp, pp),
        world=ProcessGroupRanks(_host_group(timeout_s)),
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        device=local_device(int(os.environ.get("LOCAL_RANK", "0"))),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
    )


def _host_group(timeout_s: int) -> dist.ProcessGroup | None:
    """All ranks over gloo; None where the default group is that already.

    The only one: gloo connects every two ranks of a group, and megatron-core makes dozens of groups
    which on CUDA need NCCL alone.
    """
    if dist.get_backend() != "nccl":
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return group


def tp_ranks_read_each_other(mesh: Mesh) -> bool:
    """Whether the devices of every tp group read each other's memory; always so on a CPU.

    Every rank must call this.
    """
    node = platform.node()
    places = mesh.world.all_gather((node, mesh.device.index))
    first = mesh.rank - mesh.tp_rank
    reads_all = mesh.device.type == "cpu" or all(
        peer_node == node and reads_memory_of(mesh.device, index)
        for peer_node, index in places[first : first + mesh.dims.tp]
    )
    return not ranks_where(mesh.world, not reads_all)


def broadcast_from_source(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Give every rank of ``group`` the tensor of the group's first rank.

    Every rank of ``group`` must call this.
    """
    if group.size() > 1:
        dist.broadcast(tensor, src=dist.get_process_group_ranks(group)[0], group=group)
    return tensor


def shutdown() -> None:
    """Leave the default process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

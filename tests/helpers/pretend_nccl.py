"""NCCL over gloo: process groups that take tensors of a pretended device only."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

NCCL = "nccl"
_NAMES: set[str] = set()
"""Of the groups without a backend for tensors in host memory."""


def patch_process_groups() -> None:
    """Give groups that ask for NCCL gloo instead, and let them say NCCL. Once in a process."""
    make, device_of_objects = c10d._new_process_group_helper, c10d._get_object_coll_device

    def make_over_gloo(size, rank, ranks, backend, store, name, *args, **options):
        takes_host_tensors = NCCL not in str(backend) or "cpu" in str(backend)
        (_NAMES.discard if takes_host_tensors else _NAMES.add)(name)
        group, store = make(size, rank, ranks, "gloo", store, name, *args, **options)
        if group in c10d._world.pg_map:  # this rank is a member
            c10d._world.pg_map[group] = (backend, store)
        return group, store

    def device_of_objects_here(group: dist.ProcessGroup | None = None) -> str:
        group = group or dist.group.WORLD
        return "cuda" if group.group_name in _NAMES else device_of_objects(group)

    torch.cuda.nccl.version = lambda: (2, 27, 3)  # asked for when a collective raises
    c10d.default_pg_nccl_timeout = timedelta(minutes=10)
    c10d._new_process_group_helper = make_over_gloo
    c10d._get_object_coll_device = device_of_objects_here


def refuse_as_nccl(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    """Refuse a collective of tensors that NCCL refuses.

    Raises:
        TypeError: names the collective and the tensors.
    """
    for tensor in tensors:
        if (
            tensor.device != device
            or tensor.dtype != tensors[0].dtype
            or not tensor.is_contiguous()
        ):
            given = [(str(x.device), x.dtype, x.is_contiguous()) for x in tensors]
            raise TypeError(
                f"{name} over NCCL needs contiguous tensors of one dtype on {device}; "
                f"got (device, dtype, contiguous) {given}"
            )


def refuse_host_tensors(name: str, args: Sequence[Any]) -> None:
    """Refuse a collective of tensors in host memory, by its group.

    Raises:
        TypeError: the group has no backend for them.
    """
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            group = dist.ProcessGroup.unbox(argument)
            if group.group_name in _NAMES:
                raise TypeError(f"{name}: a tensor in host memory, but the group is NCCL's alone")

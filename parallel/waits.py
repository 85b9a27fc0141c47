"""Time that this process waits for other ranks, by process group.

Every collective and message of Python code goes through a method of ``ProcessGroup``, and ends in
``Work.wait``: both are wrapped, once in a process, wherever megatron-core keeps names of its own.
With gloo the host waits there. With NCCL the device does: events on the current stream tell for how
long the kernels behind a collective had to wait.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch.distributed as dist

from triptych.parallel.device import DeviceTimer

METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "all_gather_single",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)
"""Of ``ProcessGroup``: what the functions of ``torch.distributed`` call."""
MOST_PENDING = 10_000
"""Works that somebody began and never waited for are forgotten then."""


@dataclass(frozen=True, slots=True)
class Waited:
    """What was waited, in seconds."""

    by_group_s: Mapping[str, float]
    on_device_s: float
    """The part that the host did not notice: the device waited by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class _MetGroup:
    """How a process group is called, and who waits in its collectives."""

    name: str
    on_device: bool = False
    is_alone: bool = False


NOBODYS = "wait", _MetGroup("a work of no group")


@dataclass(slots=True)
class _Waits:
    """The state of this module: a process has one training thread."""

    now: tuple[str, str] | None = None
    host_s: float = 0.0
    by_group_s: dict[str, float] = field(default_factory=dict)
    names: dict[tuple[int, ...], str] = field(default_factory=dict)
    """By ranks."""
    groups: dict[str, _MetGroup] = field(default_factory=dict)
    """By torch's name, those that were met; the groups themselves would live on here."""
    pending: dict[int, tuple[str, _MetGroup]] = field(default_factory=dict)
    """By the identity of the work that somebody may wait for."""
    timers: deque[tuple[str, DeviceTimer]] = field(default_factory=deque)


_waits = _Waits()


def measure_waits(groups: Mapping[str, dist.ProcessGroup]) -> None:
    """From now on, measure; ``groups`` by the names that they shall have, as "tp".

    A group of the same ranks as one of these has its name; any other has torch's.
    """
    ranks = {name: _ranks(group) for name, group in groups.items()}
    _waits.names, _waits.groups = {of: name for name, of in ranks.items()}, {}
    _wrap_torch()


def waits_for() -> str:
    """What this process waits in now, as "allreduce (dp)"; empty where it does not."""
    now = _waits.now  # looked at once: the watchdog's thread asks, the training thread goes on
    return "{} ({})".format(*now) if now else ""


def waited_s() -> float:
    """Seconds that the host has waited so far."""
    return _waits.host_s


def take_waits() -> Waited:
    """What was waited since this was last asked; what the device has yet to do counts later."""
    by_group_s, _waits.by_group_s = _waits.by_group_s, {}
    on_device_s = 0.0
    while _waits.timers and _waits.timers[0][1].is_done():
        name, timer = _waits.timers.popleft()
        by_group_s[name] = by_group_s.get(name, 0.0) + timer.seconds()
        on_device_s += timer.seconds()
    return Waited(by_group_s, on_device_s)


@cache
def _wrap_torch() -> None:
    group_class: Any = dist.ProcessGroup
    work_class: Any = dist.Work
    for method in METHODS:
        setattr(group_class, method, _call(method.strip("_"), getattr(group_class, method)))
    work_class.wait = _wait(work_class.wait)


def _call(method: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(process_group: dist.ProcessGroup, *args: Any, **options: Any) -> Any:
        group = _waits.groups.get(process_group.group_name) or _meet(process_group)
        if group.is_alone:
            return original(process_group, *args, **options)
        begun = _begin(method, group)
        try:
            work = original(process_group, *args, **options)
        finally:
            _end(group, begun)
        if len(_waits.pending) > MOST_PENDING:
            _waits.pending.clear()
        _waits.pending[id(work)] = method, group
        return work

    return call


def _wait(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def wait(work: dist.Work, *args: Any, **options: Any) -> Any:
        method, group = _waits.pending.pop(id(work), NOBODYS)
        begun = _begin(method, group)
        try:
            return original(work, *args, **options)
        finally:
            _end(group, begun)

    return wait


def _begin(method: str, group: _MetGroup) -> float | DeviceTimer:
    _waits.now = method, group.name
    return DeviceTimer() if group.on_device else time.perf_counter()


def _end(group: _MetGroup, begun: float | DeviceTimer) -> None:
    if isinstance(begun, DeviceTimer):
        begun.stop()
        _waits.timers.append((group.name, begun))
    else:
        seconds = time.perf_counter() - begun
        _waits.host_s += seconds
        _waits.by_group_s[group.name] = _waits.by_group_s.get(group.name, 0.0) + seconds
    _waits.now = None


def _meet(process_group: dist.ProcessGroup) -> _MetGroup:
    name = _waits.names.get(_ranks(process_group), process_group.group_desc)
    on_device = dist.get_backend(process_group) == "nccl"
    group = _MetGroup(name, on_device=on_device, is_alone=process_group.size() == 1)
    _waits.groups[process_group.group_name] = group
    return group


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))

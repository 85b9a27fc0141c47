"""The one module that knows which device and backend this is."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

# Before CUDA is first asked for. Packs vary in length: memory that can grow serves them all, where
# blocks of fixed sizes would not fit the next.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# One hardware queue keeps kernels in the order of launch: overlapping tp communication asks for it.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
HAS_CUDA = torch.cuda.is_available()
BACKEND = "nccl" if HAS_CUDA else "gloo"
"""Of every process group but the one that the hosts agree in, which is gloo's."""


def local_device(local_rank: int) -> torch.device:
    """The device of this process; makes it the current one on CUDA."""
    if not HAS_CUDA:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class Upload:
    """Tensors on their way to a device, on a stream of their own, beside the kernels of others.

    Called with each tensor; ``wait`` before the first kernel that uses one. On a CPU both do
    nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun: list[torch.Tensor] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, its values to come.

        From pinned memory: from pageable memory the host would wait for all that was launched
        before.
        """
        if self._device.type == "cpu":
            return tensor
        stream = _upload_stream(self._device)
        with torch.cuda.stream(stream):
            moved = tensor.pin_memory().to(self._device, non_blocking=True)
        self._arrived = stream.record_event()
        self._begun.append(moved)
        return moved

    def wait(self) -> None:
        """Let kernels launched from now on see the tensors; the host does not wait."""
        if not self._begun:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._arrived)
        for tensor in self._begun:  # else their memory, once freed, is filled while still in use
            tensor.record_stream(stream)


@cache
def _upload_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


PAGE_BYTES = 4096
COPYING_THREADS = 2
"""Of a CPU's copies: a single core does not take all that memory gives."""
PART_BYTES = 8 << 20
"""What one of them copies at a time."""


class HostBuffer:
    """Host memory that tensors are copied to, again and again; pinned where there is a device.

    It begins at a multiple of ``PAGE_BYTES``, as what a disk reads by itself has to.
    """

    def __init__(self) -> None:
        self.content = torch.empty(0, dtype=torch.uint8)
        """What ``fill`` copied, byte by byte."""
        self._memory = self.content

    def fill(self, copies: Sequence[tuple[torch.Tensor, int]], num_bytes: int) -> None:
        """Copy each tensor to its offset in bytes; the host waits for the device once for all.

        Args:
            copies: tensors, and where each begins: at a multiple of its elements' size.
            num_bytes: of the whole content; what no tensor covers stays as it is.
        """
        if len(self._memory) < num_bytes:
            size = num_bytes + PAGE_BYTES
            memory = torch.zeros(size, dtype=torch.uint8, pin_memory=HAS_CUDA)
            self._memory = memory[-memory.data_ptr() % PAGE_BYTES :]
        self.content = self._memory[:num_bytes]
        if HAS_CUDA:
            self._copy_each(copies)
            torch.cuda.current_stream().synchronize()
        else:
            parts = iter([part for tensor, at in copies for part in _in_parts(tensor, at)])
            with ThreadPoolExecutor(COPYING_THREADS) as pool:  # each takes the next that is left
                list(pool.map(self._copy_each, [parts] * COPYING_THREADS))

    def _copy_each(self, copies: Iterable[tuple[torch.Tensor, int]]) -> None:
        for tensor, offset in copies:
            place = self.view(offset, tensor.numel(), tensor.dtype)
            place.view(tensor.shape).copy_(tensor, non_blocking=True)

    def view(self, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,) of ``dtype``, from ``offset`` bytes on."""
        return self.content[offset : offset + numel * dtype.itemsize].view(dtype)


def _in_parts(tensor: torch.Tensor, offset: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Blocks of rows, and where each begins."""
    if tensor.nbytes <= PART_BYTES:
        yield tensor, offset
        return
    row_bytes = tensor.nbytes // len(tensor)
    num_rows = max(1, PART_BYTES // row_bytes)
    for number, part in enumerate(tensor.split(num_rows)):
        yield part, offset + number * num_rows * row_bytes


class DeviceTimer:
    """Seconds that the current CUDA stream takes from here to ``stop``; the host waits for none."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()

    def stop(self) -> None:
        """What is launched from now on is not counted."""
        self._end.record()

    def is_done(self) -> bool:
        """Whether the stream has come to the end."""
        return bool(self._end.query())

    def seconds(self) -> float:
        """Once it is done."""
        return float(self._begin.elapsed_time(self._end)) / 1000


def let_peers_work() -> None:
    """This thread, and those it starts from now on, take turns instead of interrupting each other.

    On a CPU, before the first process group. A gloo thread that is woken spins until the thread
    that it interrupted gives up a lock: with more ranks than cores, an all-reduce takes two to
    three times as long.
    """
    if not HAS_CUDA and hasattr(os, "SCHED_BATCH"):  # Linux
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@cache
def share_gloo_sockets() -> None:
    """From now on the gloo groups of this process have one thread that waits for their sockets.

    Otherwise each has its own, which wakes a hundred times a second, used or not: the 18 groups of
    a rank take 2 % of a core, and the dozens of ranks of the tests a fifth of two cores.
    """
    group_class: Any = dist.ProcessGroupGloo
    make, shared = group_class.__init__, list[Any]()

    def make_sharing(group: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        if not shared:
            make(group, store, rank, size, timeout)  # chooses the interfaces
            shared.extend(group.options._devices)
            return
        options = group_class._Options()
        options._devices, options._threads, options._timeout = shared, 2 * len(shared), timeout
        make(group, store, rank, size, options)

    group_class.__init__ = make_sharing


def be_deterministic() -> None:
    """From now on kernels and NCCL add up in one order each time. Before the first process group.

    Nothing on a CPU, where one layout on as many threads gives the same bits anyway.
    """
    if HAS_CUDA:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch has no types for it
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # one of two with which cuBLAS is
        os.environ.setdefault("NCCL_ALGO", "^NVLS")  # sums within the switch have no fixed order


def is_deterministic() -> bool:
    """Whether ``be_deterministic`` has changed this process."""
    return torch.are_deterministic_algorithms_enabled()


def is_hopper() -> bool:
    """Whether this is an H100 or a relative: FlashAttention 3 is for no other."""
    return HAS_CUDA and torch.cuda.get_device_capability()[0] == 9


def reads_memory_of(device: torch.device, index: int) -> bool:
    """Whether ``device`` reads the memory of this node's device ``index``, by NVLink or PCIe."""
    return index == device.index or torch.cuda.can_device_access_peer(device, index)


def synchronize() -> None:
    """Wait for the device, where there is something to wait for."""
    if HAS_CUDA:
        torch.cuda.synchronize()


def device_name() -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name() if HAS_CUDA else "cpu"


def peak_memory_bytes() -> int | None:
    """The most that this process's tensors have taken of the device's own memory, if it has any."""
    return torch.cuda.max_memory_allocated() if HAS_CUDA else None


def record_memory_history() -> None:
    """Let torch remember what is allocated and freed on the device from now on, and where."""
    if HAS_CUDA:
        torch.cuda.memory._record_memory_history(max_entries=100_000)


def dump_memory_history(path: str) -> None:
    """Write what was remembered, for https://pytorch.org/memory_viz, and remember no more."""
    if HAS_CUDA:
        torch.cuda.memory._dump_snapshot(path)
        torch.cuda.memory._record_memory_history(enabled=None)


def random_states() -> dict[str, torch.Tensor]:
    """Torch's random state of each device of this process, by the device's type."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if HAS_CUDA else {})


def set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Take over what ``random_states`` gave, on the same kinds of devices."""
    torch.set_rng_state(states["cpu"])
    if HAS_CUDA:
        torch.cuda.set_rng_state(states["cuda"])

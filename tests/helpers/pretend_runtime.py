"""``torch.cuda`` of a pretended device, and the places where torch treats fake tensors otherwise.

Streams and events order nothing: all that is computed is computed at once. Waiting for them is
counted.
"""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

NUM_DEVICES = 8
"""Of the pretended machine."""
MEMORY_BYTES = 80 * 2**30
PROPERTIES = SimpleNamespace(
    name="pretended H100",
    major=9,
    minor=0,
    total_memory=MEMORY_BYTES,
    multi_processor_count=132,
    warp_size=32,
)


class CurrentDevice:
    """The index of this process's current CUDA device."""

    def __init__(self) -> None:
        self.index = 0

    def set(self, device: int | str | torch.device) -> None:
        """As ``torch.cuda.set_device``."""
        index = device if isinstance(device, int) else torch.device(device).index
        if index is not None:
            self.exchange(index)

    def exchange(self, index: int) -> int:
        """Take a device, unless the index is negative; returns the one before."""
        before = self.index
        if index >= 0:
            assert index < NUM_DEVICES, f"invalid device ordinal {index}"
            self.index = index
        return before


def _nothing(*_: object, **__: object) -> None:
    """What orders kernels, frees memory or names ranges does here."""


def patch_torch(current: CurrentDevice, on_wait: Callable[[str], None]) -> None:
    """Replace what of ``torch.cuda`` asks the driver. Once in a process.

    Args:
        current: index of the current device.
        on_wait: is told whenever the host asks to wait for the device.
    """
    for name, value in _runtime(current, on_wait).items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _nothing
    torch.compile = lambda function=None, **_: function or (lambda f: f)
    # torch.tensor(..., device="cuda") makes a CPU tensor and copies it, as on a real device
    torch._C._set_only_lift_cpu_tensors(True)
    make = torch.tensor
    torch.tensor = lambda data, **options: make(_plain(data), **options)
    torch.Tensor.record_stream = _nothing
    torch.Tensor.data = property(torch._C.TensorBase.data.__get__, _set_data)
    nn.Module._apply = _apply


def _runtime(current: CurrentDevice, on_wait: Callable[[str], None]) -> dict[str, Any]:
    generator = torch.Generator()

    class PretendedStream:
        """A stream; also an event, as neither orders anything."""

        def __init__(self, *_: object, **__: object) -> None:
            self.cuda_stream, self.device = 0, torch.device("cuda", current.index)

        wait_stream = wait_event = record_event = record = wait = _nothing

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            on_wait("synchronize")

        def elapsed_time(self, _: object) -> float:
            return 0.0

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def get_rng_state(*_: object, **__: object) -> Tensor:
        return generator.get_state()

    def set_rng_state(state: Tensor, *_: object, **__: object) -> None:
        generator.set_state(state)

    no_memory = ("memory_allocated", "max_memory_allocated", "memory_reserved")
    no_action = ("_lazy_init", "init", "empty_cache", "ipc_collect", "set_stream")
    return {
        **dict.fromkeys(no_memory, lambda *_: 0),
        **dict.fromkeys((*no_action, "reset_peak_memory_stats"), _nothing),
        **dict.fromkeys(("manual_seed", "manual_seed_all"), generator.manual_seed),
        **dict.fromkeys(("Stream", "Event"), PretendedStream),
        **dict.fromkeys(("current_stream", "default_stream"), PretendedStream),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), current.exchange),
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda *_: on_wait("synchronize"),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: NUM_DEVICES,
        "current_device": lambda: current.index,
        "set_device": current.set,
        "_lazy_call": lambda function, **_: function(),
        "default_generators": (generator,) * NUM_DEVICES,
        "initial_seed": generator.initial_seed,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_device_properties": lambda *_: PROPERTIES,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda *_: PROPERTIES.name,
        "can_device_access_peer": lambda *_: True,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
    }


def _plain(data: Any) -> Any:
    """Scalars on the device as numbers, which ``torch.tensor`` would ask for below every mode."""
    if isinstance(data, (list, tuple)):
        return [_plain(entry) for entry in data]
    return data.item() if isinstance(data, FakeTensor) and data.dim() == 0 else data


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """``tensor.data = value``, also from the CPU to the device: it stays the same Python object."""
    if isinstance(value, FakeTensor) == isinstance(tensor, FakeTensor):
        torch._C.TensorBase.data.__set__(tensor, value)
        return
    new = nn.Parameter(value, tensor.requires_grad)
    tensor.__class__, new.__class__ = type(new), type(tensor)
    tensor.__dict__.update(new.__dict__)
    torch._C._swap_tensor_impl(tensor, new)


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """``nn.Module._apply``, without its question whether two tensors are of one type."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                moved = function(parameter)
            if moved is not parameter:
                parameter.data = moved
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module

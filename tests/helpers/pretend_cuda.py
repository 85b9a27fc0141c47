"""CUDA where there is none: what runs on a GPU is run, checked and counted on a CPU.

    def losses_and_waits(case):                  # at the top level of a test module
        with pretended_cuda() as device:         # tensors on "cuda" exist within it
            engine = build_engine(config_of(case), mesh)
            device.waits.clear()
            result = train_step(engine, step, lr)
            return result.loss, [str(wait) for wait in device.waits]

    def test_it(pretended_pool):                 # ranks that have pretended from the start
        losses = pretended_pool(2).run(losses_and_waits, case=case)

Every CUDA tensor is a fake tensor of torch's: device, shape and dtype without bytes, so torch
itself refuses operations on mixed devices or wrong shapes. Its values lie in a CPU storage which
its own storage carries along, hence views and operations in place work; each operation is computed
there, by the CPU's kernel or by that of ``pretend_kernels.py``. So ``HAS_CUDA`` is true, and
megatron-core runs as published.

Counted with its place is every time that the host waits for the device: ``waits``. What goes over
gloo from host memory is in ``host_collectives``: there the host waits for other ranks, not for a
device. To see both for a command of this project, on one rank or under torchrun:

    python -m triptych.tests.helpers.pretend_cuda launch/pretrain.py parallel=tp2 train.num_steps=2

It must be the first to import torch's users: megatron-core and this project look for CUDA when they
are imported. What it cannot show is in docs/kernels.md.
"""

import os
import runpy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from triptych.tests.helpers.pretend_kernels import KERNELS, refuse_as_cuda
from triptych.tests.helpers.pretend_nccl import (
    patch_process_groups,
    refuse_as_nccl,
    refuse_host_tensors,
)
from triptych.tests.helpers.pretend_registration import register_devices
from triptych.tests.helpers.pretend_runtime import NUM_DEVICES, CurrentDevice, patch_torch

ROOT = Path(__file__).parents[2]
COPIES = ("aten::_to_copy", "aten::copy_")


@dataclass(frozen=True, slots=True)
class Wait:
    """The host waited for the device, once."""

    kind: str
    where: str
    """File and function of the project."""
    line: int
    through: str
    """The same of a library that was called from there, with the line; or empty."""
    in_microbatches: bool
    """During forward and backward passes, not after the last."""

    def __str__(self) -> str:
        return f"{self.kind} in {self.where}"

    @property
    def place(self) -> str:
        """For people, with line numbers, which the other fields are free of."""
        file, _, function = self.where.partition(" ")
        through = f" through {self.through}" if self.through else ""
        return f"{self.kind} in {file}:{self.line} {function}{through}"


class PretendedCuda(TorchDispatchMode):
    """Takes every operation on CUDA tensors, see above."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.host_collectives: list[Wait] = []
        self.current = CurrentDevice()
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def note_wait(self, kind: str) -> None:
        """The host waits for the device."""
        self.waits.append(_wait(kind))

    def to_host(self, tensor: Tensor) -> Tensor:
        """The values of a CUDA tensor, uncounted and without a copy; others as they are."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        storage = tensor.untyped_storage().on_host
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.empty(0, dtype=tensor.dtype).set_(storage, *place)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """One operation of torch's."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs, name = dict(kwargs or {}), func._schema.name
        if _is_cuda(kwargs.get("device")):  # by its index: torch caches what "cuda" has meant once
            kwargs["device"] = self._indexed(kwargs["device"])
        tensors = _tensors_in((args, kwargs))
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not fakes and not _is_cuda(kwargs.get("device")):
            return self._on_host(func, name, args, kwargs)
        if name.startswith("c10d::"):
            return self._collective(func, name, args, kwargs, tensors)
        if name == "aten::_local_scalar_dense":
            self.note_wait("item")
            return func(self.to_host(args[0]))
        crosses = name in COPIES and len(fakes) < len(tensors)
        if crosses or _leaves_device(name, kwargs):
            return self._copy(func, name, args, kwargs)
        refuse_as_cuda(name, args, tensors)
        if any(tensor.dim() for tensor in tensors if not isinstance(tensor, FakeTensor)):
            self.note_wait(f"CPU tensor in {name}")
        return self._compute(func, name, args, kwargs, fakes)

    def _on_host(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The CPU's own; here with pinned memory, which a build for CPUs has none of."""
        if name == "aten::_pin_memory":
            return _pinned(args[0].clone())
        if name == "aten::is_pinned":
            return _is_pinned(args[0])
        if name.startswith("c10d::"):
            refuse_host_tensors(name, args)
            self.host_collectives.append(_wait(name))
        if kwargs.get("pin_memory"):
            return _pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Between host and device; the host does not wait if its side is pinned and it says so."""
        non_blocking = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
        target = args[0] if name == "aten::copy_" else None
        source = args[1] if name == "aten::copy_" else args[0]
        if isinstance(source, FakeTensor):
            # torch pins by itself what .to("cpu", non_blocking=True) copies to
            if not (non_blocking and (target is None or _is_pinned(target))):
                self.note_wait("copy to the host")
            copy = func(*_each(self.to_host, args), **kwargs)
            return _pinned(copy) if non_blocking and target is None else copy
        if not (non_blocking and _is_pinned(source)):
            self.note_wait("pageable copy to the device")
        if target is not None:
            self.to_host(target).copy_(source)
            return target
        copy = source.detach().to(kwargs.get("dtype") or source.dtype, copy=True)
        return self._on_device(copy, kwargs["device"])

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, fakes: list[Any]) -> Any:
        """Shapes and devices by fake tensors, values by the CPU."""
        host_args, host_kwargs = _each(self.to_host, args), _each(self.to_host, kwargs)
        if _is_cuda(kwargs.get("device")):
            host_kwargs["device"] = "cpu"
        compute = KERNELS.get(name, func)
        try:
            with self._shapes:
                out = func(*_each(self._fake, args), **_each(self._fake, kwargs))
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.note_wait(f"values asked for by {name}")
            computed = compute(*host_args, **host_kwargs)
            return _each(lambda tensor: self._on_device(tensor, fakes[0].device), computed)
        outputs = _tensors_in(out)
        is_view = outputs and not func._schema.is_mutable and all(map(_has_values, outputs))
        if is_view:
            return out
        computed = _tensors_in(compute(*host_args, **host_kwargs))
        for fake, real in zip(outputs, computed, strict=True):
            if not any(fake is given for given in fakes):
                assert fake.shape == real.shape, f"{name}: {fake} is {real.shape} on a CPU"
                _give_values(fake, real)
        return out

    def _collective(self, func: Any, name: str, args: Any, kwargs: Any, tensors: Any) -> Any:
        """Over gloo, between the values."""
        refuse_as_nccl(name, tensors, torch.device("cuda", self.current.index))
        if name == "c10d::barrier":
            self.note_wait("barrier")
        by_values: dict[int, FakeTensor] = {}
        kept = []

        def values(tensor: Tensor) -> Tensor:
            real = self.to_host(tensor)
            by_values[id(real)] = tensor
            kept.append(real)
            return real

        result = func(*_each(values, args), **_each(values, kwargs))
        return _each(lambda tensor: by_values.get(id(tensor), tensor), result)

    def _on_device(self, values: Tensor, device: Any) -> Tensor:
        """A CUDA tensor with these values."""
        fake = self._fake(values, self._indexed(device))
        _give_values(fake, values)
        return fake

    def _indexed(self, device: Any) -> torch.device:
        """The CUDA device; the current one where no index is given."""
        device = torch.device(device)
        return torch.device("cuda", self.current.index if device.index is None else device.index)

    def _fake(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self._shapes:
            return torch.empty_strided(
                tensor.size(),
                tensor.stride(),
                dtype=tensor.dtype,
                device=device or tensor.device,
            )


@cache
def _device() -> PretendedCuda:
    """The one of this process."""
    assert "triptych.parallel.device" not in sys.modules, "pretended too late: see the docstring"
    os.environ["DS_ACCELERATOR"] = "cuda"  # DeepSpeed asks the driver itself
    # flash-attn's own Python code runs where it is installed, compiled or not
    sys.modules.setdefault("flash_attn_2_cuda", ModuleType("flash_attn_2_cuda"))
    device = PretendedCuda()
    register_devices(NUM_DEVICES, lambda: device.current.index)
    patch_torch(device.current, device.note_wait)
    patch_process_groups()

    def to_list(tensor: Tensor) -> Any:
        """One copy; torch would ask a fake tensor for one number after the other."""
        device.note_wait("tolist")
        return device.to_host(tensor).tolist()

    FakeTensor.tolist = to_list
    # in every thread; a mode is of one
    torch.Tensor.pin_memory = lambda tensor: (
        tensor if _is_pinned(tensor) else _pinned(tensor.clone())
    )
    return device


def pretend_cuda() -> None:
    """From now on, and for good, this process has CUDA devices.

    Raises:
        RuntimeError: this torch cannot be told of them.
    """
    _device()


@contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """Within it, CUDA tensors can be made and computed with; nothing has been waited for yet."""
    device = _device()
    device.waits.clear()
    device.host_collectives.clear()
    with device, warnings.catch_warnings():
        # DeepSpeed asks whether its partitions are aligned
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield device


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _leaves_device(name: str, kwargs: Any) -> bool:
    device = kwargs.get("device")
    return name == "aten::_to_copy" and device is not None and not _is_cuda(device)


def _pinned(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().is_pinned_here = True
    return tensor


def _is_pinned(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "is_pinned_here")


def _has_values(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "on_host")


def _give_values(fake: Tensor, real: Tensor) -> None:
    """Let the storage of ``fake`` carry the values, laid out as its strides say."""
    storage = fake.untyped_storage()
    if hasattr(storage, "on_host"):
        return
    real = real.detach().to(fake.dtype)
    place = (fake.size(), fake.stride(), fake.storage_offset())
    numel = storage.nbytes() // max(1, fake.element_size())
    fits = real.untyped_storage().nbytes() >= numel * real.element_size()
    if (real.size(), real.stride(), real.storage_offset()) != place or not fits:
        laid_out = torch.zeros(numel, dtype=real.dtype)
        laid_out.as_strided(*place).copy_(real)
        real = laid_out
    storage.on_host = real.untyped_storage()


def _each(function: Callable[[Tensor], Any], found: Any) -> Any:
    """The same nest of lists, tuples and dicts, with ``function`` of every tensor."""
    if isinstance(found, Tensor):
        return function(found)
    if isinstance(found, (list, tuple)):
        return type(found)([_each(function, entry) for entry in found])
    if isinstance(found, dict):
        return {key: _each(function, entry) for key, entry in found.items()}
    return found


def _tensors_in(found: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    _each(tensors.append, found)
    return tensors


def _wait(kind: str) -> Wait:
    """Where the caller's caller stands. Autograd's threads know only custom backward functions."""
    frames = list(_frames(sys._getframe(2)))
    ours = [frame for frame in frames if _is_ours(frame)] or frames[-1:]
    near = next((frame for frame in frames if not _is_torch(frame)), frames[0])
    functions = {frame.f_code.co_name for frame in frames}
    return Wait(
        kind,
        f"{_short(ours[0])} {ours[0].f_code.co_qualname}",
        ours[0].f_lineno,
        "" if near is ours[0] else f"{_short(near)}:{near.f_lineno}",
        threading.current_thread() is not threading.main_thread()
        or ("run_microbatches" in functions and "finalize_model_grads" not in functions),
    )


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if not Path(frame.f_code.co_filename).name.startswith("pretend_"):
            yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def _is_torch(frame: FrameType) -> bool:
    return "/site-packages/torch/" in frame.f_code.co_filename


def _short(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(ROOT)) if _is_ours(frame) else "/".join(path.parts[-2:])


def main(argv: list[str]) -> None:
    """Run a script, then list what the host waited for, by place."""
    pretend_cuda()
    sys.argv = argv
    with pretended_cuda() as device:
        try:
            runpy.run_path(argv[0], run_name="__main__")
        finally:
            places = [wait.place for wait in device.waits]
            for place in sorted(set(places)):
                print(f"{places.count(place):5} {place}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Makes torch's C++ believe in CUDA devices, in a build of torch for CPUs.

Autograd and tensor factories ask two C++ objects about CUDA; a build for CPUs answers "not linked
with support for cuda devices", for fake tensors too:

- the *device guard*, which switches devices and counts them;
- the *hooks*, which say whether there is CUDA, and how many devices.

Both have virtual functions: such a C++ object begins with the address of a table of them, in the
order in which its header declares them. So it answers otherwise once that address points to a copy
of the table in which some entries are Python functions, made callable by ctypes. The order is read
from the headers that torch ships. This holds for one version of torch, which is checked.
"""

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

TORCH = "2.13.0"
CUDA = 1
"""c10::DeviceType::CUDA."""
WORD = ctypes.sizeof(ctypes.c_void_p)
_KEPT: list[object] = []
"""What C++ points to: it must live as long as the process."""


def why_impossible() -> str | None:
    """Why this torch cannot be told of a device that is not there; None where it can."""
    version = torch.__version__.partition("+")[0]
    if version != TORCH:
        return (
            f"pretended CUDA devices stand on the ABI of torch {TORCH}, this is {version}"
            "  -> read tests/helpers/pretend_registration.py against the new headers, set TORCH"
        )
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "pretended CUDA devices need a build of torch for CPUs; this one has real ones"
    return None


def register_devices(num_devices: int, current_device: Callable[[], int]) -> None:
    """From now on torch knows of ``num_devices`` CUDA devices. Once in a process.

    Raises:
        RuntimeError: this torch cannot be told so.
    """
    if reason := why_impossible():
        raise RuntimeError(reason)
    libraries = Path(torch.__file__).parent / "lib"
    c10 = ctypes.CDLL(str(libraries / "libc10.so"))
    _replace_functions(
        _no_op_guard(c10),
        ["c10/core/impl/DeviceGuardImplInterface.h"],
        {
            "deviceCount": lambda: num_devices,
            "getDevice": lambda: CUDA | current_device() << 8,  # a Device: type, then index
        },
    )
    get_hooks = ctypes.CDLL(str(libraries / "libtorch_cpu.so"))["_ZN2at6detail12getCUDAHooksEv"]
    get_hooks.restype = ctypes.c_void_p
    yes = ("isBuilt", "isAvailable", "hasCUDA", "hasPrimaryContext", "init")
    _replace_functions(
        get_hooks(),
        ["ATen/detail/AcceleratorHooksInterface.h", "ATen/detail/CUDAHooksInterface.h"],
        dict.fromkeys(yes, lambda: 1)
        | {"deviceCount": lambda: num_devices}
        | dict.fromkeys(("getCurrentDevice", "current_device"), current_device),
    )
    assert torch.accelerator.current_accelerator() == torch.device("cuda")


def _no_op_guard(c10: ctypes.CDLL) -> int:
    """The address of torch's own guard that does nothing, registered for CUDA.

    Torch puts it in the place of a guard that counts no devices, for fake tensors on a machine
    whose driver is missing. So one is registered first, all of whose functions return 0.
    """
    nothing = (ctypes.c_void_p * 64)(*[_address_of(lambda: 0)] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(nothing))
    _KEPT.extend([nothing, guard])
    prefix = "_ZN3c104impl"
    register = c10[
        f"{prefix}19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"
    ]
    register.argtypes = [ctypes.c_int8, ctypes.c_void_p]
    register(CUDA, ctypes.addressof(guard))
    torch._C._ensureCUDADeviceGuardSet()
    registry = (ctypes.c_void_p * (CUDA + 1)).in_dll(c10, f"{prefix}26device_guard_impl_registryE")
    address = registry[CUDA]
    assert address is not None
    return address


def _replace_functions(
    instance: int, headers: Sequence[str], functions: Mapping[str, Callable[[], int]]
) -> None:
    """Give one C++ object, by its address, a table of virtual functions of its own."""
    names = [name for header in headers for name in _virtual_functions(header)]
    table_of = ctypes.cast(instance, ctypes.POINTER(ctypes.c_void_p))
    assert table_of[0] is not None
    before = 2  # offset to the top and type information lie before what the object points to
    old = ctypes.cast(table_of[0] - before * WORD, ctypes.POINTER(ctypes.c_void_p))
    size = before + len(names)
    new = (ctypes.c_void_p * size)(*old[:size])
    for name, function in functions.items():
        new[before + names.index(name)] = _address_of(function)
    _KEPT.append(new)
    table_of[0] = ctypes.addressof(new) + before * WORD


def _virtual_functions(header: str) -> list[str]:
    """In the order of the table, in which a destructor has two entries."""
    text = (Path(torch.__file__).parent / "include" / header).read_text()
    names = re.findall(r"^  virtual [^(]*?(~?\w+)\(", text, re.MULTILINE)
    return [entry for name in names for entry in [name] * (2 if name.startswith("~") else 1)]


def _address_of(function: Callable[[], int]) -> int:
    """Of a C function that calls this one; what it is given is left where it is."""
    callback = ctypes.CFUNCTYPE(ctypes.c_int64)(function)
    _KEPT.append(callback)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    assert address is not None
    return address

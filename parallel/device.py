"""The one module that knows which device and backend this is.

Where there is CUDA, nothing here does anything but name it: megatron-core runs as published, over
NCCL. Where there is none, ``prepare_megatron`` lets megatron-core run on a CPU over gloo, by
reading its modules through a small rewriting loader: ``torch.cuda`` becomes the ``CpuRuntime``
below, ``torch.compile`` does nothing, the literal ``"cuda"`` becomes ``"cpu"``, ``x.cuda()``
becomes ``x.cpu()``. Only ``megatron.core`` is rewritten, only in memory, and only for the pinned
version; so what the tests of parallelism run on a laptop is the code that runs on a GPU. See
docs/adr/0001-megatron-on-cpu.md.
"""

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any

import torch

from triptych.errors import ConfigError

MEGATRON_VERSION = "0.16.1"
# One hardware queue keeps kernels in the order of launch: overlapping tp communication asks for it.
# Before CUDA is first asked for.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
HAS_CUDA = torch.cuda.is_available()
BACKEND = "cpu:gloo,cuda:nccl" if HAS_CUDA else "gloo"


def local_device(local_rank: int) -> torch.device:
    """The device of this process; makes it the current one on CUDA."""
    if not HAS_CUDA:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, as kernels launched from now on see it.

    From pinned memory: from pageable memory the host would wait for all that was launched before.
    """
    if device.type == "cpu" or tensor.device == device:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def let_peers_work() -> None:
    """This thread, and those it starts from now on, take turns instead of interrupting each other.

    On a CPU, before the first process group. A gloo thread that is woken spins until the thread
    that it interrupted gives up a lock: with more ranks than cores, an all-reduce takes two to
    three times as long.
    """
    if not HAS_CUDA and hasattr(os, "SCHED_BATCH"):  # Linux
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def synchronize() -> None:
    """Wait for the device, where there is something to wait for."""
    if HAS_CUDA:
        torch.cuda.synchronize()


def prepare_megatron() -> None:
    """Make ``megatron.core`` importable on this device; call it before its first import.

    Raises:
        ConfigError: another version of megatron-core is installed than the one this was tested
            with.
    """
    installed = importlib.metadata.version("megatron-core")
    if installed != MEGATRON_VERSION:
        raise ConfigError(
            f"megatron-core {installed} is installed; this project is tested with "
            f"{MEGATRON_VERSION}  -> pip install megatron-core=={MEGATRON_VERSION}"
        )
    _silence_expected_warnings()
    if HAS_CUDA or any(isinstance(finder, CpuFinder) for finder in sys.meta_path):
        return
    assert not any(name.startswith("megatron.core") for name in sys.modules), (
        "prepare_megatron() came after the first import of megatron.core"
    )
    sys.modules[CpuRuntime.__name__] = CpuRuntime()
    sys.meta_path.insert(0, CpuFinder())


def _silence_expected_warnings() -> None:
    """megatron-core warns at import of every kernel that is not installed.

    Our own table at start says it once.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    quiet = logging.getLogger("megatron.core.tensor_parallel.random")
    quiet.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _nothing(*_: object, **__: object) -> None:
    """What streams, events and synchronisation do on a CPU."""


class CpuRuntime(ModuleType):
    """Stands for ``torch.cuda`` inside megatron-core on a CPU.

    What it lacks falls through to the real one.
    """

    __name__ = "triptych_cpu_runtime"

    class Stream:
        """A stream that has nothing to order."""

        def __init__(self, *args: object, **kwargs: object) -> None: ...

        wait_stream = wait_event = synchronize = _nothing

    class Event:
        """An event that has always happened."""

        def __init__(self, *args: object, **kwargs: object) -> None: ...

        record = wait = synchronize = _nothing

    class _Generators:
        def __getitem__(self, index: int) -> torch.Generator:
            return torch.default_generator

    def __init__(self) -> None:
        super().__init__(self.__name__)
        self.default_generators = self._Generators()
        self.random = self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @staticmethod
    def manual_seed(seed: int) -> None:
        """Seed the CPU generator."""
        torch.manual_seed(seed)

    @staticmethod
    def get_rng_state(*_: object, **__: object) -> torch.Tensor:
        """State of the CPU generator."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: object, **__: object) -> None:
        """Restore the CPU generator."""
        torch.set_rng_state(state)

    @staticmethod
    def stream(_: object) -> contextlib.AbstractContextManager[None]:
        """There are no streams to switch to."""
        return contextlib.nullcontext()

    @classmethod
    def current_stream(cls, *_: object) -> "CpuRuntime.Stream":
        """A stream that has nothing to order."""
        return cls.Stream()

    default_stream = current_stream

    @staticmethod
    def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
        """Stands for ``torch.compile``, which on a CPU asks for a C++ compiler and seconds."""
        return function

    @staticmethod
    def _lazy_call(callback: Callable[[], None], **_: object) -> None:
        callback()

    synchronize = empty_cache = set_device = _lazy_init = staticmethod(_nothing)


class _CudaToCpu(ast.NodeTransformer):
    """The rewrite itself."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:  # ast's naming
        self.generic_visit(node)
        of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
        runtime = ast.copy_location(ast.Name(id=CpuRuntime.__name__, ctx=ast.Load()), node)
        if of_torch and node.attr == "compile":
            node.value, node.attr = runtime, "uncompiled"
        elif of_torch and node.attr == "cuda":
            return runtime
        elif node.attr == "cuda":
            node.attr = "cpu"
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        moves_to_device = isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
        self.generic_visit(node)
        if moves_to_device:
            node.args, node.keywords = [], []
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if node.value in ("cuda", "cuda:0"):
            node.value = "cpu"
        elif isinstance(node.value, str) and node.value.startswith("torch.cuda."):
            node.value = node.value.replace("torch.cuda.", "torch.")
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        if node.module == "torch.cuda":
            node.module = CpuRuntime.__name__
        return node


class CpuLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module of megatron-core with ``torch.cuda`` replaced; reads and writes no .pyc."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile the rewritten source.

        Raises:
            ConfigError: a mention of CUDA survived the rewrite, which would run on no CPU.
        """
        path = self.get_filename(fullname)
        tree = _CudaToCpu().visit(ast.parse(self.get_data(path), path))
        self._refuse_survivors(tree, path)
        body = tree.body
        first = 0
        while first < len(body) and (_is_docstring(body[first]) or _is_future_import(body[first])):
            first += 1
        body.insert(first, ast.parse(f"import {CpuRuntime.__name__}").body[0])
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    @staticmethod
    def _refuse_survivors(tree: ast.AST, path: str) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "cuda":
                raise ConfigError(
                    f"{path}:{node.lineno} still uses CUDA after the rewrite for CPUs"
                )


class CpuFinder(importlib.abc.MetaPathFinder):
    """Finds ``megatron.core`` modules where they are, and gives them the rewriting loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Spec with ``CpuLoader`` for ``megatron.core.*``; None leaves the rest to Python."""
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = CpuLoader(spec.loader.name, spec.loader.path)
        return spec


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_future_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"

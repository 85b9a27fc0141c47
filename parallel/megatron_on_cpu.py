"""megatron-core on a CPU, over gloo.

A small rewriting loader reads its modules: ``torch.cuda`` becomes the ``CpuRuntime`` below,
``torch.compile`` does nothing, the literal ``"cuda"`` becomes ``"cpu"``, ``x.cuda()`` becomes
``x.cpu()``. Only ``megatron.core`` is rewritten, its sources stay as they are, and only for the
pinned version; so what the tests of parallelism run on a laptop is the code that runs on a GPU. See
docs/adr/0001-megatron-on-cpu.md.
"""

import ast
import contextlib
import importlib.machinery
import importlib.util
import marshal
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
import xxhash

from triptych.errors import ConfigError


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


_REWRITER = Path(__file__).read_bytes()


class CpuLoader(importlib.machinery.SourceFileLoader):
    """Compiles a module of megatron-core with ``torch.cuda`` replaced.

    What comes out is kept beside Python's own .pyc, under a name that holds a hash of the source
    and of this file: rewriting takes half of the time of megatron-core's import.
    """

    def get_code(self, fullname: str) -> CodeType:
        """The compiled, rewritten source.

        Raises:
            ConfigError: a mention of CUDA survived the rewrite, which would run on no CPU.
        """
        path = self.get_filename(fullname)
        source = self.get_data(path)
        digest = xxhash.xxh3_128_hexdigest(_REWRITER + source)
        kept = importlib.util.cache_from_source(path, optimization=f"cpu{digest}")
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
            code: CodeType = marshal.loads(self.get_data(kept))
            return code
        code = self._rewritten(source, path)
        if not sys.dont_write_bytecode:
            self.set_data(kept, marshal.dumps(code))  # all at once; nothing where it cannot
        return code

    def _rewritten(self, source: bytes, path: str) -> CodeType:
        tree = _CudaToCpu().visit(ast.parse(source, path))
        self._refuse_survivors(tree, path)
        body = tree.body
        first = 0
        while first < len(body) and (_is_docstring(body[first]) or _is_future_import(body[first])):
            first += 1
        body.insert(first, ast.parse(f"import {CpuRuntime.__name__}").body[0])
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        return code

    @staticmethod
    def _refuse_survivors(tree: ast.AST, path: str) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "cuda":
                raise ConfigError(
                    f"{path}:{node.lineno} still uses CUDA after the rewrite for CPUs"
                )


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_future_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


sys.modules[CpuRuntime.__name__] = CpuRuntime()  # where rewritten modules import it from

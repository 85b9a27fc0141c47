"""A rank of the pool, seen from inside: waits for cases, answers with a result or a traceback."""

import faulthandler
import gc
import importlib.util
import io
import itertools
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FORGET = b""
"""Sent to each rank once all have answered a case."""


@dataclass(frozen=True, slots=True)
class PoolCall:
    """A call, by name. Its arguments are pickled apart: they may need the module loaded first."""

    module: str
    file: str
    qualname: str
    kwargs: bytes

    @classmethod
    def of(cls, function: Callable[..., Any], kwargs: dict[str, Any]) -> "PoolCall":
        """Describe a call of ``function``.

        Raises:
            TypeError: the ranks could not find this function by name.
        """
        module, qualname = function.__module__, function.__qualname__
        if "<" in qualname:
            raise TypeError(
                f"{module}.{qualname} must stand at the top level of its module: "
                "the ranks of a pool load it by name"
            )
        file = getattr(sys.modules[module], "__file__", "")  # a built-in module has none
        return cls(module, file, qualname, pickle.dumps(kwargs))

    def call(self) -> Any:
        """Load the module if need be, and call the function."""
        module = sys.modules.get(self.module) or _load(self.module, self.file)
        return operator.attrgetter(self.qualname)(module)(**pickle.loads(self.kwargs))


@dataclass(frozen=True, slots=True)
class Returned:
    """The pickled result of a case."""

    value: bytes


@dataclass(frozen=True, slots=True)
class Raised:
    """The formatted traceback of a case."""

    traceback: str


def serve(
    rank: int, world_size: int, connection: Connection, log: Path, stack: Path, rendezvous: Path
) -> None:
    """Say that it is there, then run cases until pytest closes the connection or ends."""
    os.setsid()  # a process group of its own: Ctrl-C is pytest's, children end with the rank
    threading.Thread(target=_end_with_pytest, daemon=True).start()
    _write_output_to(log)
    stack_file = stack.open("w")
    faulthandler.enable(stack_file, all_threads=False)
    faulthandler.register(signal.SIGUSR2, stack_file, all_threads=False)
    # As torchrun would; code under test may read them.
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }
    os.environ.update({name: str(value) for name, value in place.items()})

    import torch

    from triptych.parallel.device import let_peers_work, share_gloo_sockets

    torch.set_num_threads(1)
    let_peers_work()
    share_gloo_sockets()
    # What was imported before the fork stays frozen. A run that freezes and thaws all there is
    # would have every collection afterwards look through it, for .3 s each.
    gc.freeze = gc.unfreeze = lambda: None
    connection.send_bytes(pickle.dumps(Returned(pickle.dumps(None))))
    for number in itertools.count():
        try:
            message = connection.recv_bytes()
            connection.send_bytes(pickle.dumps(_answer(message, rendezvous / str(number))))
            all_have_answered = connection.recv_bytes()
        except EOFError:
            return
        assert all_have_answered == FORGET
        _forget_last_case()


def _answer(message: bytes, rendezvous: Path) -> Returned | Raised:
    try:
        case: PoolCall = pickle.loads(message)
        _join_group(rendezvous)
        return Returned(_pickled(case.call()))
    except BaseException:  # SystemExit and pytest's own outcomes are failures too
        return Raised(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class _Pickler(pickle.Pickler):
    """Writes a tensor as the bytes it has: torch makes a zip archive with checksums of each."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if type(value) is not torch.Tensor or value.is_cuda or value.requires_grad:
            return NotImplemented
        content = value.contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (content, value.dtype, value.shape)


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _tensor(content: Any, dtype: Any, shape: Any) -> Any:
    import torch

    return torch.from_numpy(content).view(dtype).view(shape)


def _join_group(rendezvous: Path) -> None:
    import torch.distributed as dist

    from triptych.parallel.device import BACKEND

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(rendezvous), world_size)
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=world_size)


def _forget_last_case() -> None:
    """Make cases independent of their order: groups, memory and random numbers start anew.

    Runs when every rank has answered, so nobody is still using the groups. A gloo group left behind
    costs two threads.
    """
    import torch
    import torch.distributed as dist

    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel

    # A wrapped model and the hooks on its gradients hold each other, by way of C++ where DeepSpeed
    # was there: the collector does not see that, and the model would keep its groups.
    for wrapped in [one for one in gc.get_objects() if type(one) is DistributedDataParallel]:
        for parameter in wrapped.parameters():
            vars(parameter).clear()
        vars(wrapped).clear()
    parallel_state.destroy_model_parallel()  # it holds on to them
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    torch.manual_seed(0)


def _load(name: str, file: str) -> Any:
    """Import by name where that finds this file; else from the file, as pytest does for tests."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin != file:
        spec = importlib.util.spec_from_file_location(name, file)
        for parent in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
            sys.modules.setdefault(parent, types.ModuleType(parent))  # unpickling imports it
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _write_output_to(log: Path) -> None:
    """Send stdout and stderr, C++ code's too, to a file that pytest empties for each case."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _end_with_pytest() -> None:
    """A rank in a collective would not notice that pytest is gone; this thread does."""
    pytest_process = multiprocessing.parent_process()
    assert pytest_process is not None
    pytest_process.join()
    os.killpg(0, signal.SIGKILL)

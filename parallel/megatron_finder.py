"""What happens at the first import of ``megatron.core``.

Its version is checked, its expected warnings are silenced, trackers that it would import and we do
not let it use are hidden from it, and where there is no CUDA its modules are given the loader of
``megatron_on_cpu``. This module itself imports neither torch nor
megatron-core: a tool that needs neither does not wait for them.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from triptych.errors import ConfigError

MEGATRON_VERSION = "0.16.1"
IMPORT_TRACKERS = ("megatron.core.timers", "megatron.core.inference.contexts.dynamic_context")
TRACKERS = ("wandb", "torch.utils.tensorboard")
"""A fifth of what a process takes to its first step, in every rank, if these modules import them;
they do without where these are not installed."""


def prepare_megatron() -> None:
    """Make ``megatron.core`` importable on this device; call it before its first import."""
    if any(isinstance(finder, MegatronFinder) for finder in sys.meta_path):
        return
    assert not any(name.startswith("megatron.core") for name in sys.modules), (
        "prepare_megatron() came after the first import of megatron.core"
    )
    sys.meta_path.insert(0, MegatronFinder())


class MegatronFinder(importlib.abc.MetaPathFinder):
    """Finds ``megatron.core`` modules where they are, and gives them other loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """How to load ``megatron.core.*``; None leaves the rest to Python.

        Raises:
            ConfigError: another version of megatron-core is installed than the one this was tested
                with.
        """
        if not fullname.startswith("megatron.core"):
            return None
        if fullname == "megatron.core":
            _refuse_other_version()
            _silence_expected_warnings()
        # late: imports torch; asked here as nobody who could say has been imported yet
        from triptych.parallel.device import HAS_CUDA

        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        if not HAS_CUDA:
            from triptych.parallel.megatron_on_cpu import CpuLoader

            spec.loader = CpuLoader(spec.loader.name, spec.loader.path)
        if fullname in IMPORT_TRACKERS:
            spec.loader = LoaderWithoutTrackers(spec.loader)
        return spec


class LoaderWithoutTrackers(importlib.abc.Loader):
    """Runs a module as if ``TRACKERS`` were not installed."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        """Load by ``loader``."""
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does; what it tries to import of ``TRACKERS`` raises ImportError."""
        hidden = [name for name in TRACKERS if name not in sys.modules]
        sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
        try:
            self._loader.exec_module(module)
        finally:
            for name in hidden:
                del sys.modules[name]


def _refuse_other_version() -> None:
    installed = importlib.metadata.version("megatron-core")
    if installed != MEGATRON_VERSION:
        raise ConfigError(
            f"megatron-core {installed} is installed; this project is tested with "
            f"{MEGATRON_VERSION}  -> pip install megatron-core=={MEGATRON_VERSION}"
        )


def _silence_expected_warnings() -> None:
    """megatron-core warns at import of every kernel that is not installed, torch of a barrier.

    Our own table at start says once what is installed.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    # On CUDA; parallel.device.local_device has made it the current one.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")
    quiet = logging.getLogger("megatron.core.tensor_parallel.random")
    quiet.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

"""What happens at the first import of ``megatron.core``.

Its version is checked, its expected warnings are silenced, and where there is no CUDA its modules
are given the loader of ``megatron_on_cpu``. This module itself imports neither torch nor
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


def prepare_megatron() -> None:
    """Make ``megatron.core`` importable on this device; call it before its first import."""
    if any(isinstance(finder, MegatronFinder) for finder in sys.meta_path):
        return
    assert not any(name.startswith("megatron.core") for name in sys.modules), (
        "prepare_megatron() came after the first import of megatron.core"
    )
    sys.meta_path.insert(0, MegatronFinder())


class MegatronFinder(importlib.abc.MetaPathFinder):
    """Finds ``megatron.core`` modules where they are; on a CPU, gives them the rewriting loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Spec with ``CpuLoader`` for ``megatron.core.*``; None leaves the rest to Python.

        Raises:
            ConfigError: another version of megatron-core is installed than the one this was tested
                with.
        """
        if not fullname.startswith("megatron.core"):
            return None
        if fullname == "megatron.core":
            _refuse_other_version()
            _silence_expected_warnings()
        from triptych.parallel.device import HAS_CUDA  # late: imports torch

        if HAS_CUDA:
            return None
        from triptych.parallel.megatron_on_cpu import CpuLoader

        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = CpuLoader(spec.loader.name, spec.loader.path)
        return spec


def _refuse_other_version() -> None:
    installed = importlib.metadata.version("megatron-core")
    if installed != MEGATRON_VERSION:
        raise ConfigError(
            f"megatron-core {installed} is installed; this project is tested with "
            f"{MEGATRON_VERSION}  -> pip install megatron-core=={MEGATRON_VERSION}"
        )


def _silence_expected_warnings() -> None:
    """megatron-core warns at import of every kernel that is not installed.

    Our own table at start says it once.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    quiet = logging.getLogger("megatron.core.tensor_parallel.random")
    quiet.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

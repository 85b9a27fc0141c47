"""What every test may use: the pool of ranks, and skips that name what the machine lacks."""

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from triptych.tests.helpers.pool import PRELOAD, PRETEND_PRELOAD, RankPool

if TYPE_CHECKING:
    from triptych.tests.helpers.runs import Runs

settings.register_profile(
    "a busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("a busy machine")


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """``pool(world_size).run(function, **kwargs)`` runs a case on gloo ranks; see ``pool.py``."""
    yield from pools(tmp_path_factory.mktemp("pool"), PRELOAD)


@pytest.fixture(scope="session")
def pretended_pool(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[int], RankPool]]:
    """As ``pool``, of ranks with a pretended CUDA device each; see ``pretend_cuda.py``."""
    from triptych.tests.helpers.pretend_registration import why_impossible  # late: torch

    if reason := why_impossible():
        pytest.skip(reason)
    yield from pools(tmp_path_factory.mktemp("pretended"), PRETEND_PRELOAD)


def pools(folder: Path, preload: str) -> Iterator[Callable[[int], RankPool]]:
    """A pool for each world size, from its first case on to the end of the session."""
    by_size: dict[int, RankPool] = {}

    def of_size(world_size: int) -> RankPool:
        if world_size not in by_size:
            by_size[world_size] = RankPool(world_size, folder / str(world_size), preload)
        return by_size[world_size]

    yield of_size
    for one in by_size.values():
        one.stop()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample data, of a size that suffices for tests: ``data.root``. Not to be changed."""
    from triptych.data.digits.make import make_digits  # late: it takes 2 s

    root = tmp_path_factory.mktemp("digits") / "sample_data"
    make_digits(root, num_images=60, num_samples=120)
    return root


@pytest.fixture
def runs(pool: Callable[[int], RankPool], digits: Path, tmp_path: Path) -> "Runs":
    """Runs of this test, on ``pool`` and ``digits``."""
    from triptych.tests.helpers.runs import Runs  # late: torch

    return Runs(pool, digits, tmp_path)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run; ``-ra`` lists the reasons at the end."""
    for mark, missing in {"gpu": missing_for_gpu, "slurm": missing_for_slurm}.items():
        if item.get_closest_marker(mark) and (reason := missing()):
            pytest.skip(reason)


@functools.cache
def missing_for_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device"


@functools.cache
def missing_for_slurm() -> str | None:
    if os.geteuid() != 0:
        return "needs root: the throw-away Slurm cluster lives in namespaces of its own"
    commands = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "ip")
    if absent := [command for command in commands if shutil.which(command) is None]:
        return f"needs {', '.join(absent)}; docs/slurm.md says how to install them"
    probe = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        return (
            "needs the right to make namespaces, which this container does not give (CAP_SYS_ADMIN)"
        )
    return None

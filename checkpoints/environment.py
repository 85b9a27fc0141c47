"""``environment.json``: which code, where, on what device; for people who ask what made a run."""

import functools
import json
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from triptych.parallel.device import device_name
from triptych.parallel.mesh import Mesh

PACKAGES = ("triptych", "torch", "megatron-core", "deepspeed", "transformers", "numpy", "pillow")
ROOT = Path(__file__).parents[1]


def write_environment(path: Path, mesh: Mesh) -> None:
    """Write what the process on rank 0 knows of itself."""
    content = {
        "git": git_state(ROOT),
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "world_size": mesh.dims.world_size,
        "layout": str(mesh.dims),
        "device": device_name(),
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


@functools.cache
def git_state(root: Path) -> dict[str, Any] | None:
    """The commit of the code in ``root``, and the files that differ from it; as they first were.

    None where ``root`` is no clone, as an installed package is not, or git is not there.
    """
    if not (root / ".git").exists():
        return None  # git would answer for whatever repository lies around it
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": [line[2:].strip() for line in changed]}


def _version(package: str) -> str | None:
    """None for what was not installed as a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return ended.stdout.rstrip()

"""The rewriting loader: what it makes of a source, and what it keeps of that."""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from triptych.parallel import megatron_on_cpu
from triptych.parallel.device import HAS_CUDA
from triptych.parallel.megatron_finder import LoaderWithoutTrackers
from triptych.parallel.megatron_on_cpu import CpuLoader

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="nothing is rewritten where there is CUDA")
SOURCE = """import torch
def where(): return torch.cuda.current_device(), "cuda"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module, where Python may keep what it compiles."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    return path


def load(path: Path) -> dict:
    namespace: dict = {}
    exec(CpuLoader("module", str(path)).get_code("module"), namespace)  # as import does
    return namespace


def kept(path: Path) -> list[Path]:
    return sorted((path.parent / "__pycache__").glob("module.*.pyc"))


def test_what_was_rewritten_is_kept(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [str(place) for place in load(module)["where"]()] == ["cpu", "cpu"]
    assert len(kept(module)) == 1

    def rewrite(*_: object) -> None:
        raise AssertionError("rewritten again")

    monkeypatch.setattr(CpuLoader, "_rewritten", rewrite)
    assert [str(place) for place in load(module)["where"]()] == ["cpu", "cpu"]


def test_another_source_or_rewriter_is_rewritten(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(module)
    module.write_text(SOURCE.replace("where", "place"))
    assert "place" in load(module)
    monkeypatch.setattr(megatron_on_cpu, "_REWRITER", b"another")
    load(module)
    assert len(kept(module)) == 3


@pytest.mark.parametrize("content", [b"", b"\x00garbage", b"cut"])
def test_a_damaged_file_is_made_again(module: Path, content: bytes) -> None:
    load(module)
    [file] = kept(module)
    whole = file.read_bytes()
    file.write_bytes(whole[:20] if content == b"cut" else content)
    assert "where" in load(module)
    assert file.read_bytes() == whole


def test_nothing_is_written_where_python_may_not(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert "where" in load(module)
    assert not kept(module)


def test_trackers_are_hidden_from_a_module_and_from_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    path = tmp_path / "timers.py"
    path.write_text("try:\n    import wandb\nexcept ImportError:\n    wandb = None\n")
    loader = LoaderWithoutTrackers(SourceFileLoader("timers", str(path)))
    spec = importlib.util.spec_from_loader("timers", loader)
    assert spec is not None
    timers = importlib.util.module_from_spec(spec)
    loader.exec_module(timers)
    assert timers.wandb is None
    assert "wandb" not in sys.modules
    assert importlib.util.find_spec("wandb") is not None

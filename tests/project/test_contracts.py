"""The contracts on imports catch what they are there for: a planted import breaks the right one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import triptych

ROOT = Path(triptych.__file__).parent
PLANTED = {
    "upwards": ("parallel/mesh.py", "triptych.train.loop", "Imports go downwards only"),
    "across": ("data/types.py", "triptych.parallel.device", "Imports go downwards only"),
    "torch": ("configs/schema.py", "torch", "Configuration and costs never wait for torch"),
    "torch where data are prepared": (
        "data/media/image.py",
        "torch",
        "Processes that prepare data never wait for torch",
    ),
    "megatron": ("train/step.py", "megatron.core", "megatron-core stays in"),
    "megatron at the root": ("errors.py", "megatron.core", "megatron-core stays in"),
    "deepspeed": ("parallel/zero/gather.py", "deepspeed", "DeepSpeed stays in"),
    "hydra": ("configs/validate.py", "hydra", "Hydra stays in"),
}
"""File, module that it must not import, start of the contract's name."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product alone, in a folder of its own, with the contracts beside it."""
    folder = tmp_path_factory.mktemp("copy")
    for source in ROOT.glob("*/**/*.py"):
        path = source.relative_to(ROOT)
        if (source.parent / "__init__.py").exists() and not path.parts[0].startswith("."):
            target = folder / "triptych" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for name in ("__init__.py", "errors.py"):
        shutil.copyfile(ROOT / name, folder / "triptych" / name)
    shutil.copyfile(ROOT / "setup.cfg", folder / "setup.cfg")
    return folder


def broken(folder: Path) -> list[str]:
    """The names of the contracts that do not hold, as lint-imports prints them."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=folder, capture_output=True, text=True
    )
    verdicts = [line for line in run.stdout.splitlines() if " KEPT" in line or " BROKEN" in line]
    assert len(verdicts) == 6, run.stdout + run.stderr
    return [line for line in verdicts if " BROKEN" in line]


def test_the_product_keeps_every_contract(copy: Path) -> None:
    assert broken(copy) == []


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_import_breaks_its_contract(copy: Path, plant: str) -> None:
    name, module, contract = PLANTED[plant]
    path = copy / "triptych" / name
    source = path.read_text()
    try:
        path.write_text(f"{source}\nimport {module}\n")
        assert any(line.startswith(contract) for line in broken(copy))
    finally:
        path.write_text(source)

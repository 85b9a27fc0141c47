"""What holds of the repository as a whole: packages, pins, ignored files, words to avoid."""

import configparser
import re
import shutil
import subprocess
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import yaml

import triptych

ROOT = Path(triptych.__file__).parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def lines(section: str, option: str) -> list[str]:
    """The entries of a list in setup.cfg."""
    return SETUP.get(section, option).split("\n")[1:]


def normal(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Distribution -> version, of constraints.txt."""
    entries = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(entry.split("==") for entry in entries if not entry.startswith("#"))


@cache
def tracked() -> tuple[Path, ...]:
    """The files that git has; the test is skipped where this is no clone."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(ROOT / name for name in listed.split("\0") if (ROOT / name).is_file())


def test_every_package_is_listed() -> None:
    found = {
        ".".join(("triptych", *path.parent.relative_to(ROOT).parts))
        for path in ROOT.glob("**/__init__.py")
        if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks", "build", "runs")
        and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    }
    assert found == set(lines("options", "packages"))


def test_no_two_files_or_classes_share_a_name() -> None:
    """One name, one thing: whoever searches for it finds it. Commands and test folders aside."""
    files, classes = defaultdict(list), defaultdict(list)
    for path in tracked():
        if path.suffix != ".py":
            continue
        where = str(path.relative_to(ROOT))
        for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE):
            classes[name].append(where)
        if path.name != "__init__.py":
            files[path.name].append(where)
    assert {name: found for name, found in classes.items() if len(found) > 1} == {}
    assert {name: found for name, found in files.items() if len(found) > 1} == {}


def test_every_python_file_lies_in_a_package() -> None:
    stray = [
        path
        for path in tracked()
        if path.suffix == ".py"
        and path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")
        and not (path.parent / "__init__.py").exists()
    ]
    assert stray == []


@pytest.mark.parametrize("folder", ["data", "checkpoints", "configs/data", "data/stores"])
def test_code_is_not_ignored(folder: str) -> None:
    tracked()
    command = ["git", "check-ignore", "--no-index", f"{folder}/new.py", f"{folder}/new.yaml"]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout == ""


def test_runs_are_ignored() -> None:
    tracked()
    command = ["git", "check-ignore", "runs/debug/stage2/metrics.jsonl", ".venv/bin/python"]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(ignored.stdout.splitlines()) == 2


def requirements() -> list[str]:
    """What is installed by pip install -e '.[dev]'."""
    wanted = [*lines("options", "install_requires"), *lines("options.extras_require", "dev")]
    return [re.split(r"[<>=!~;\[ ]", entry)[0] for entry in wanted]


def test_every_requirement_is_pinned() -> None:
    pinned = {normal(name) for name in pins()}
    assert [name for name in requirements() if normal(name) not in pinned] == []


def test_pins_are_exact_sorted_and_without_local_builds() -> None:
    versions = pins()
    names = [name.lower() for name in versions]
    assert names == sorted(names)
    assert [
        name for name, version in versions.items() if not re.fullmatch(r"[\w.!]+", version)
    ] == []
    assert versions["megatron-core"] == "0.16.1"


def test_apex_is_never_fetched() -> None:
    """The registry's apex is another project; NVIDIA's is installed from its source."""
    wanted = [*lines("options", "install_requires"), *pins()]
    for extra in SETUP["options.extras_require"]:
        wanted += lines("options.extras_require", extra)
    assert [name for name in wanted if normal(name).startswith("apex")] == []


def test_no_file_names_a_registry_or_a_machine() -> None:
    hosts = [
        "py" + "pi.org",
        "py" + "pi.python.org",
        "python" + "hosted.org",
        "download.py" + "torch.org",
    ]
    paths = ["/" + "work/", "/" + "root/", "/" + "home/", "/" + "Users/"]
    named = re.compile("|".join(re.escape(word) for word in hosts + paths))
    guilty = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # pictures
        guilty += [f"{path.relative_to(ROOT)}: {found[0]}" for found in named.finditer(text)]
    assert guilty == []


def test_the_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == SETUP["metadata"]["version"]
    assert citation["license"] == SETUP["metadata"]["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_lint_targets_the_oldest_python_supported() -> None:
    target = tomllib.loads((ROOT / "ruff.toml").read_text())["target-version"]
    assert SETUP["options"]["python_requires"] == ">=3." + target.removeprefix("py3")


def test_every_yaml_is_packaged() -> None:
    patterns = [
        entry.strip() for entry in SETUP["options.package_data"]["triptych.configs"].split(",")
    ]
    packaged = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert packaged == set((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    "target", ["install", "demo", "test", "test-fast", "test-full", "checks", "bench"]
)
def test_make_has_the_target(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_every_mark_in_make_is_declared() -> None:
    declared = {entry.split(":")[0] for entry in lines("tool:pytest", "markers")}
    used = set(re.findall(r"not (\w+)", (ROOT / "Makefile").read_text()))
    assert used <= declared

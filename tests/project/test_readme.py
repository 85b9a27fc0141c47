"""Every command of README and docs is one that can be typed: composed and validated, not run.

Paths that a reader has and this machine lacks are the only problems a command may have. Where a
page shows what a command answers, it answers that.
"""

import argparse
import ast
import itertools
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from triptych.configs.compose import load_config
from triptych.configs.validate import validate
from triptych.errors import ConfigError
from triptych.launch import convert, demo, prepare, report, sample
from triptych.launch.inspection import command as inspection
from triptych.launch.inspection import export_order, verify_datasets

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("torchrun", "python", "sbatch", "pytest", "make")
MISSING_PATH = re.compile(
    r"(data\.|init\.\w+=|resume=)\S+ (is no folder|is no file|does not exist)  "
)


def parse_prepare(words: list[str]) -> argparse.Namespace:
    others = {
        "inspect": inspection.parse_args,
        "verify": verify_datasets.parse_args,
        "export-order": export_order.parse_args,
    }
    return others[words[0]](words[1:]) if words[0] in others else prepare.parse_args(words)


ARGPARSE: dict[str, Callable[[list[str]], argparse.Namespace]] = {
    "launch/prepare.py": parse_prepare,
    "launch/convert.py": lambda words: convert._parser().parse_args(words),
    "launch/sample.py": lambda words: sample._parser().parse_args(words),
    "launch/demo.py": lambda words: demo._parser().parse_args(words),
    "launch/report.py": lambda words: report._parser().parse_args(words),
}


class Command(NamedTuple):
    """A command as a page shows it."""

    where: str
    words: list[str]
    answer: str
    """The lines that the page shows below it; empty where it shows none."""


def commands_of_page(page: Path) -> Iterator[Command]:
    """Those in indented and fenced blocks, and those in prose between backticks."""
    fenced = False
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        fenced ^= line.startswith("```")
        where = f"{page.relative_to(ROOT)}:{number + 1}"
        if fenced or line.startswith("    "):
            shown = line.strip()
            block = itertools.takewhile(lambda text: text.startswith("    "), lines[number + 1 :])
            answer = "\n".join(text[4:] for text in block) if shown.startswith("$ ") else ""
            yield from command(where, shown.removeprefix("$ "), answer)
        else:
            for text in re.findall(r"`([^`]+)`", line):
                yield from command(where, text)


def command(where: str, text: str, answer: str = "") -> Iterator[Command]:
    if text.split(" ")[0] in PROGRAMS and " " in text and "..." not in text:
        yield Command(where, shlex.split(text, comments=True), answer)


def commands_of_launchers() -> Iterator[Command]:
    """Those in the docstrings that ``--help`` prints."""
    for file in sorted((ROOT / "launch").glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        for line in text.replace("\\\n", " ").splitlines():
            yield from command(f"launch/{file.name}", line.strip())


COMMANDS = [
    *itertools.chain.from_iterable(map(commands_of_page, PAGES)),
    *commands_of_launchers(),
]


def option(words: list[str], name: str, default: int) -> int:
    """The number after ``--name`` or ``--name=``."""
    found = re.search(rf"--(?:{name})[= ](\d+)", " ".join(words))
    return int(found[1]) if found else default


def test_commands_are_found() -> None:
    texts = [" ".join(command.words) for command in COMMANDS]
    assert len(texts) > 30
    for expected in ("torchrun launch/pretrain.py stage=2", "python launch/convert.py import Qwen"):
        assert any(text.startswith(expected) for text in texts)
    assert sum(bool(command.answer) for command in COMMANDS) == 2


@pytest.mark.parametrize("shown", COMMANDS, ids=lambda shown: f"{shown.where} {shown.words[1:3]}")
def test_a_command_can_be_typed(
    shown: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = next((word for word in shown.words if re.search(r"\.(py|sbatch)$", word)), None)
    if shown.words[0] == "make":
        check_make_target(shown.words)
    elif shown.words[0] == "pytest":
        files = [word for word in shown.words if word.startswith("tests/")]
        assert files
        assert all((ROOT / word).is_file() for word in files)
    else:
        assert script is not None
        assert (ROOT / script).is_file()
        at = shown.words.index(script)
        before, after = shown.words[:at], shown.words[at + 1 :]
        monkeypatch.chdir(tmp_path)
        if script.startswith("launch/") and "pretrain" in script:
            nodes, gpus = option(before, "nnodes|nodes", 1), option(before, "gpus-per-node", 1)
            check_run(after, nodes * option(before, "nproc-per-node", gpus), shown.answer)
        elif script in ARGPARSE:
            ARGPARSE[script](after)  # exits where it does not accept them


def test_every_path_of_the_readmes_training_is_made_by_a_command_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command leaves the folders it would leave; the runs then lack nothing."""
    block = (ROOT / "README.md").read_text().partition("The real thing")[2].split("\n\n")[1]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    num_runs = 0
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "mkdir":
            subprocess.run(line, shell=True, check=True)
        for made in ("--local-dir", "--output"):
            if made in words:
                Path(words[words.index(made) + 1]).mkdir(parents=True)
        if "import" in words:
            Path(words[words.index("import") + 2]).mkdir(parents=True)
        if "stage=3" in words:
            validate(load_config(words[words.index("stage=3") :]), world_size=8)
            num_runs += 1
    assert num_runs == 2


def check_make_target(words: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    made = subprocess.run(
        [*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr


def check_run(words: list[str], world_size: int, answer: str) -> None:
    """Compose and validate in an empty folder; ``FOLDER/data/my_mixture.yaml`` is the reader's."""
    if "--config-dir" in words:
        own = Path(words[words.index("--config-dir") + 1]) / "data" / "my_mixture.yaml"
        own.parent.mkdir(parents=True)
        shutil.copy(ROOT / "configs/data/example.yaml", own)
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            load_config(words)
        return
    told = ""
    try:
        validate(load_config(words), world_size)
    except ConfigError as error:
        told = f"ConfigError: {error}"
    if answer:
        assert told == answer
    else:
        assert [text for text in told.splitlines()[1:] if not MISSING_PATH.search(text)] == []

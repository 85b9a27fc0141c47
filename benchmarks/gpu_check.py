"""All that is claimed of CUDA, checked and measured where there is a GPU; one page as the result.

    make gpu                                           # on all GPUs of this machine
    python benchmarks/gpu_check.py model=qwen2_vl_7b   # takes the overrides of launch/pretrain.py
    python benchmarks/gpu_check.py --miniature         # a small model: whether all of it runs
    sbatch --nodes 2 --gpus-per-node 8 launch/slurm/gpu_check.sbatch     # on several machines

Kernels and layouts against the CPU, throughput against transformers and against a large matrix
product, memory against the plan, and what to put into a cluster file. Each section is a command of
its own, in a process of its own: one that fails says why, and the others go on. The page is
FOLDER/page.md, for docs/benchmarks.md; beside it lies what each section wrote to stderr. The exit
code is 0 if every bar was met.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 600
"""A section that takes longer is stopped."""
NUM_LOG_LINES = 15
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=gpu")
DEFAULTS = ("model=qwen2_vl_2b", "stage=2", "train.precision=bf16", "train.seq_len=4096")
"""Of what is measured on one GPU."""
SMALL_MODEL = (
    "model=debug",
    "train.precision=bf16",
    "train.seq_len=256",
    "model.vision.hidden_size=64",
    "model.vision.intermediate_size=128",
    "model.language.hidden_size=96",
    "model.language.head_dim=24",
    "model.language.mrope_section=[4,4,4]",
    "model.language.intermediate_size=128",
)


@dataclass(frozen=True, slots=True)
class Launchers:
    """What stands before a script's name."""

    alone: Sequence[str] = (sys.executable,)
    """In one process, with the first GPU."""
    all_ranks: Sequence[str] = TORCHRUN


@dataclass(frozen=True, slots=True)
class Section:
    """A script of this folder whose stdout is a part of the page."""

    title: str
    name: str
    words: Sequence[str] = ()
    on_all_ranks: bool = False
    fence: str = ""
    """The language, where its output is no Markdown."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a section."""

    section: Section
    verdict: str
    met: bool
    seconds: float
    text: str


def with_defaults(words: Sequence[str]) -> list[str]:
    """The defaults, but for those that ``words`` say otherwise, and ``words``."""
    given = {word.partition("=")[0] for word in words}
    return [*(d for d in DEFAULTS if d.partition("=")[0] not in given), *words]


def sections(words: Sequence[str], *, miniature: bool) -> list[Section]:
    """All, in the order of the page."""
    words = with_defaults([*SMALL_MODEL, *words] if miniature else words)
    options = ["--miniature"] if miniature else []
    return [
        Section("Machine", "machine"),
        Section("Kernels", "gpu_kernels"),
        Section("Layouts", "gpu_layouts", words=options, on_all_ranks=True),
        Section("Throughput and memory", "gpu", words=[*options, *words]),
        Section("Calibration", "calibrate", words=words, fence="yaml"),
    ]


def run_section(section: Section, launchers: Launchers, folder: Path) -> Finding:
    """Run it, and show what it prints while it does."""
    launcher = launchers.all_ranks if section.on_all_ranks else launchers.alone
    command = [*launcher, str(Path("benchmarks") / f"{section.name}.py"), *section.words]
    log, begin, lines = folder / f"{section.name}.log", time.monotonic(), []
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        limit = threading.Timer(LIMIT_S, process.terminate)
        limit.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
            process.wait()
        finally:
            limit.cancel()
            process.terminate()  # after Ctrl-C; of one that has ended, nothing
    seconds = time.monotonic() - begin
    verdict, text = judged(process.returncode, "".join(lines), log)
    return Finding(section, verdict, process.returncode == 0, seconds, text)


def judged(returncode: int, text: str, log: Path) -> tuple[str, str]:
    """Verdict and text of a section that has ended; of one that failed, with the end of its log."""
    if returncode == 0:
        return "met", text
    if "| NOT MET |" in text:
        return "NOT MET", text
    last = log.read_text().splitlines()[-NUM_LOG_LINES:]
    said = "\n".join(f"    {line}" for line in last)
    print(f"{said}\n{log} has the rest", flush=True)
    return f"failed, exit code {returncode}", f"{text}\n{said}\n"


def page(findings: Sequence[Finding]) -> str:
    """The result as Markdown."""
    head = ["## GPU check", "", "| section | bars | seconds |", "|---|---|---|"]
    rows = [f"| {one.section.title} | {one.verdict} | {one.seconds:.0f} |" for one in findings]
    return "\n".join([*head, *rows, *map(part, findings)]) + "\n"


def part(found: Finding) -> str:
    """A section under its title."""
    text = found.text.strip("\n")
    if found.section.fence and found.met:
        text = f"```{found.section.fence}\n{text}\n```"
    return f"\n### {found.section.title}\n\n{text}"


def check(all_sections: Sequence[Section], launchers: Launchers, folder: Path) -> bool:
    """Run all, write the page; returns whether every bar was met."""
    folder.mkdir(parents=True, exist_ok=True)
    findings = []
    for number, section in enumerate(all_sections, start=1):
        print(f"\n== {number}/{len(all_sections)} {section.title}\n", flush=True)
        findings.append(found := run_section(section, launchers, folder))
        print(f"\n{section.title}: {found.verdict}, {found.seconds:.0f} s", flush=True)
        (folder / "page.md").write_text(page(findings))
        if section.name == "machine" and not found.met:
            break  # no GPU: nothing of it can run
    print(f"\n{folder / 'page.md'} has all of this", flush=True)
    return len(findings) == len(all_sections) and all(found.met for found in findings)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--miniature", action="store_true", help="a small model, few samples")
    found.add_argument(
        "--output", type=Path, default=Path("runs/gpu_check"), help="folder of page and logs"
    )
    found.add_argument(
        "--launcher",
        type=shlex.split,
        default=list(TORCHRUN),
        help="what runs a script on all ranks (default: torchrun on the GPUs of this machine)",
    )
    return found


def main(argv: Sequence[str]) -> None:
    """Check; exit code 1 if a bar was not met."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options, words = parser().parse_known_args(argv)
    chosen = sections(words, miniature=options.miniature)
    launchers = Launchers(all_ranks=options.launcher)
    if not check(chosen, launchers, options.output.resolve()):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])

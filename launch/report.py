"""One HTML page about a run, or several side by side: opens in any browser, fetches nothing.

    python launch/report.py runs/qwen2_vl_7b/stage2
    python launch/report.py runs/lr_1e-4 runs/lr_3e-4 --output compared.html   # in the same charts
    python launch/report.py runs/demo                                  # all runs in a folder

Reads what the run has written so far and changes nothing: type it also while the run goes on.
"""

import argparse
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from triptych.errors import ConfigError
from triptych.launch.cli import run
from triptych.launch.reporting.page import render
from triptych.launch.reporting.run_record import contact_sheets, read_run
from triptych.train.events import EVENTS
from triptych.train.records import METRICS

LEFT_BY_RUNS = ("config.yaml", METRICS, EVENTS)


def main(argv: Sequence[str]) -> None:
    """Read, draw, write.

    Raises:
        ConfigError: a folder does not exist, or the page has no folder to lie in.
    """
    options = _parser().parse_args(argv)
    output: Path = options.output
    if missing := [str(folder) for folder in options.runs if not folder.is_dir()]:
        raise ConfigError(f"{', '.join(missing)} is no folder  -> name run folders (run.dir)")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is no folder  -> mkdir -p it")
    folders = list(dict.fromkeys(inner for folder in options.runs for inner in _runs_in(folder)))
    named = zip(folders, _names(folders), strict=True)
    records = [read_run(folder, name) for folder, name in named]
    around = [folder for folder in options.runs if folder not in folders]
    sheets = [sheet for folder in around for sheet in contact_sheets(folder)]
    page = render(records, sheets, datetime.now().astimezone()).encode(errors="replace")
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_bytes(page)
    os.replace(temporary, output)
    steps = sum(len(record.steps) for record in records)
    print(f"{output}: {len(records)} runs, {steps:,} steps, {len(page) / 1e3:,.0f} kB")


def _runs_in(folder: Path) -> list[Path]:
    """The folder, if a run has it, or those in it that runs have, the oldest first."""
    if not _is_run(folder):
        inner = [path for path in folder.iterdir() if path.is_dir() and _is_run(path)]
        if inner:
            return sorted(inner, key=lambda path: (_began(path), path))
    return [folder]


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in LEFT_BY_RUNS)


def _began(run_dir: Path) -> float:
    """When the first of the records that are still there was written."""
    return min((run_dir / n).stat().st_mtime for n in LEFT_BY_RUNS if (run_dir / n).exists())


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders without what all have in common."""
    if len(folders) == 1:
        return [str(folders[0])]
    common = os.path.commonpath([folder.absolute().parent for folder in folders])
    return [os.path.relpath(folder.absolute(), common) for folder in folders]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_DIR", help="run folder, or a folder of some"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="file (default: report.html)"
    )
    return parser


if __name__ == "__main__":
    run(main)

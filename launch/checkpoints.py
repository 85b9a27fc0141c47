"""List, verify and prune the checkpoints of a run.

    python launch/checkpoints.py list runs/mine
    python launch/checkpoints.py verify runs/mine       # reads every byte; 1 where one is damaged
    python launch/checkpoints.py prune runs/mine --keep 1

A proven checkpoint was committed after a later step whose loss was finite. ``prune`` deletes all
but the newest ``--keep``, the newest proven and those that ``run.keep_every`` keeps, once it has
seen that the newest of these is good.
Neither command renames or mends anything.
"""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from triptych.checkpoints.layout import CHECKPOINTS, CheckpointFolder, step_folders
from triptych.checkpoints.locate import locate
from triptych.checkpoints.manifest import read_manifest, verify
from triptych.checkpoints.store import delete, is_proven, size_of, to_retire
from triptych.configs.compose import read_config
from triptych.errors import CheckpointError, ConfigError
from triptych.launch.cli import run
from triptych.parallel.agree import SingleProcess
from triptych.train.lock import lock_run_dir


def main(argv: Sequence[str]) -> None:
    """Do what the command line says.

    Raises:
        ConfigError: ``--keep`` is below 1, or a run is going on that is to be pruned.
        CheckpointError: there is no checkpoint, or one that was read is damaged.
    """
    options = _parser().parse_args(argv)
    root = options.run / CHECKPOINTS if (options.run / CHECKPOINTS).is_dir() else options.run
    folders = step_folders(root)
    if not folders:
        raise CheckpointError(f"{root} has no checkpoint  -> name a run folder")
    if options.action == "list":
        for folder in folders:
            print(_line(folder))
    elif options.action == "verify":
        _verify(folders)
    else:
        if options.keep < 1:
            raise ConfigError(f"--keep {options.keep} must be at least 1  -> try 1")
        with lock_run_dir(root.parent, SingleProcess()):
            _prune(root, options.keep)


def _line(folder: Path) -> str:
    """Name, time, size, and what its manifest says."""
    try:
        info = read_manifest(folder).info
    except (CheckpointError, OSError) as error:
        return f"{folder.name}  {error}"
    saved = datetime.fromtimestamp(CheckpointFolder(folder).commit.stat().st_mtime)
    proven = "proven" if is_proven(folder) else "unproven"
    told = "  ".join(str(info[key]) for key in ("stage", "layout") if key in info)
    return f"{folder.name}  {saved:%Y-%m-%d %H:%M:%S}  {_size(folder)}  {proven}  {told}"


def _verify(folders: list[Path]) -> None:
    """Read every byte of each, and say of all whether it is as it was saved."""
    damaged = []
    for folder in folders:
        problems = verify(folder, SingleProcess())
        if problems:
            damaged.append(folder.name)
        print("\n  ".join([f"{folder.name}  {'damaged:' if problems else 'good'}", *problems]))
    if damaged:
        raise CheckpointError(
            f"{', '.join(damaged)} damaged  -> a run with resume=auto passes over it; or restore it"
        )


def _prune(root: Path, keep: int) -> None:
    config = CheckpointFolder(step_folders(root)[0]).config  # an imported checkpoint has none
    keep_every = read_config(config).run.keep_every if config.exists() else 0
    retired = to_retire(root, keep, keep_every)
    if retired:
        locate(root, SingleProcess())  # raises where the newest is damaged
    for folder in retired:
        line = f"{folder.name}  {_size(folder)}"
        delete([folder])
        print(f"deleted {line}")
    print(f"kept {', '.join(folder.name for folder in step_folders(root))}")


def _size(folder: Path) -> str:
    return f"{size_of(folder) / 2**20:,.0f} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, told in (
        ("list", "one line each, newest first"),
        ("verify", "read every byte"),
        ("prune", "delete old ones"),
    ):
        action = actions.add_parser(name, help=told)
        action.add_argument("run", type=Path, help="run folder, or a folder of checkpoints")
        if name == "prune":
            action.add_argument("--keep", type=int, required=True, help="newest that stay")
    return parser


if __name__ == "__main__":
    run(main)

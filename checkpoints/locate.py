"""The checkpoint that a person means, for whoever only reads."""

from pathlib import Path

from triptych.checkpoints.layout import (
    CHECKPOINTS,
    CheckpointFolder,
    parse_step,
    state_of,
    step_folders,
    step_names,
)
from triptych.checkpoints.manifest import verify
from triptych.errors import CheckpointError
from triptych.parallel.agree import Ranks, on_rank_0


def locate(path: Path, ranks: Ranks) -> Path:
    """The checkpoint that a person means by ``path``, verified. Every rank must call this.

    Changes nothing, and falls back on nothing.

    Args:
        path: a run folder or its ``checkpoints`` folder, for the newest in it; or one checkpoint.
        ranks: who shares the reading.

    Raises:
        CheckpointError: there is none, with what was found instead; or it is damaged.
    """
    folder, others = on_rank_0(ranks, lambda: _resolve(path), os_error=CheckpointError)
    problems = verify(folder, ranks)
    if problems:
        advice = f"\n  -> the one before is {others[0]}; name it to use it" if others else ""
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(f"checkpoint {folder} is damaged:{listed}{advice}")
    return folder


def _resolve(path: Path) -> tuple[Path, list[Path]]:
    """The checkpoint that ``path`` names, and the older ones beside it."""
    if not path.exists():
        known = step_folders(path.parent)
        beside = f"; beside it: {', '.join(folder.name for folder in known)}" if known else ""
        raise CheckpointError(f"{path} does not exist{beside}  -> name a run or a checkpoint")
    state = state_of(path.name)
    if state:
        raise CheckpointError(f"{path} is no checkpoint: {state[1:]}")
    if state is not None:
        own = parse_step(path.name)
        return path, [other for other in step_folders(path.parent) if parse_step(other.name) < own]
    if CheckpointFolder(path).commit.exists():  # a checkpoint copied under another name
        return path, []
    for root in (path / CHECKPOINTS, path):
        if folders := step_folders(root):
            return folders[0], folders[1:]
    if damaged := [
        name for root in (path / CHECKPOINTS, path) for name in step_names(root, ".damaged")
    ]:
        raise CheckpointError(
            f"{path} has no good checkpoint, only {', '.join(damaged)}"
            "  -> restore one from a backup, or name another run"
        )
    if (path / "config.json").exists() and list(path.glob("*.safetensors*")):
        raise CheckpointError(
            f"{path} is a Hugging Face model -> convert it with launch/convert.py, name the result"
        )
    content = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else ["a file"]
    raise CheckpointError(
        f"{path} is neither a run folder, nor its checkpoints folder, nor a checkpoint; "
        f"found {', '.join(content[:8]) or 'nothing'} in it  -> name one of these"
    )

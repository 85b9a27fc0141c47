"""Where exported weights come from: what their folder must say of how they were trained."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from triptych.checkpoints.layout import CHECKPOINTS, CheckpointFolder, step_folders
from triptych.checkpoints.manifest import read_manifest
from triptych.configs.compose import read_config
from triptych.configs.schema import Config, DataConfig
from triptych.data.types import PixelLimits
from triptych.errors import ConfigError

BASE_STAGES = ("warmup", "stage1", "stage2")
"""What comes before instructions: such a model continues text, and is no chat model."""
LICENCE_UNKNOWN = "licence not stated in its folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The run and the step that weights are of."""

    limits: PixelLimits
    """Of training; Qwen's own, if they were imported."""
    stage: str
    """Of the run; ``imported``, if no run saved them."""
    run: str = ""
    """Its folder."""
    step: int = 0
    consumed_tokens: int = 0
    """LLM tokens of the stage up to here."""
    plan: str = ""
    """Hash of the plan of the data."""
    parents: tuple[str, ...] = ()
    """What the run started from, and what that did, each with its licence where that is known."""

    @property
    def is_base(self) -> bool:
        """Not yet trained on instructions."""
        return self.stage in BASE_STAGES


def origin_of(folder: Path) -> Origin:
    """The origin of a checkpoint that is known to be good."""
    checkpoint, info = CheckpointFolder(folder), read_manifest(folder).info
    config = read_config(checkpoint.config) if checkpoint.config.is_file() else None
    data = config.data if config else DataConfig()
    train = {}
    if checkpoint.numbers.is_file():
        train = json.loads(checkpoint.numbers.read_text())["train"]
    return Origin(
        limits=PixelLimits.of(data),
        stage=info["stage"],
        run=config.run.dir if config else "",
        step=read_manifest(folder).step,
        consumed_tokens=train.get("consumed_tokens", 0),
        plan=info.get("plan", ""),
        parents=tuple(_parents(folder, config)),
    )


def licence_of(folder: Path) -> str:
    """What a Hugging Face folder says of its licence, as its README.md states it."""
    card = folder / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    found = re.search(r"^license(?:_name)?:\s*(\S+)", text, re.MULTILINE)
    return f"licence {found[1]}" if found else LICENCE_UNKNOWN


def _parents(folder: Path, config: Config | None) -> Iterator[str]:
    if config is None:
        info = read_manifest(folder).info
        yield f"{info.get('from', folder)} ({info.get('licence', LICENCE_UNKNOWN)})"
        return
    for key in ("language", "vision"):
        path = getattr(config.init, key)
        if path is not None:
            yield f"{path} as init.{key} ({licence_of(Path(path))})"
    if config.init.checkpoint is not None:
        yield from _of_checkpoint(Path(config.init.checkpoint))


def _of_checkpoint(path: Path) -> Iterator[str]:
    """A checkpoint that a run started from, and its own parents, as far as they are still there."""
    folders = [path, *step_folders(path / CHECKPOINTS), *step_folders(path)]
    folder = next((each for each in folders if CheckpointFolder(each).manifest.is_file()), None)
    if folder is None:
        yield f"{path} (no longer there: what it came from is not known)"
        return
    checkpoint, manifest = CheckpointFolder(folder), read_manifest(folder)
    try:
        config = read_config(checkpoint.config) if checkpoint.config.is_file() else None
    except ConfigError:
        config = None
    if manifest.info["stage"] != "imported":
        yield f"{folder}: {manifest.info['stage']}, step {manifest.step}"
    yield from _parents(folder, config)

"""``model.json``: what model the weights of a checkpoint are of."""

import json
from dataclasses import asdict
from pathlib import Path

from triptych.configs.schema import LanguageConfig, ModelConfig, TokensConfig, VisionConfig
from triptych.errors import CheckpointError

NAME = "model.json"


def write_model(folder: Path, model: ModelConfig) -> None:
    """Write it beside the weights."""
    (folder / NAME).write_text(json.dumps(asdict(model), indent=1) + "\n")


def read_model(folder: Path) -> ModelConfig:
    """The model of a checkpoint.

    Raises:
        CheckpointError: the file is missing, or of another version of this project.
    """
    try:
        content = json.loads((folder / NAME).read_text())
        return ModelConfig(
            name=content["name"],
            vision=VisionConfig(**content["vision"]),
            language=LanguageConfig(**content["language"]),
            tokens=TokensConfig(**content["tokens"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / NAME} does not describe a model: {error}") from error


def differences(folder: Path, model: ModelConfig) -> list[str]:
    """Sizes, and what no tensor shows: heads, rotary base and sections, epsilon, token ids."""
    theirs, ours = asdict(read_model(folder)), asdict(model)
    return [
        f"model.{group}.{key}={value}, the checkpoint has {theirs[group][key]}"
        for group in ("vision", "language", "tokens")
        for key, value in ours[group].items()
        if theirs[group][key] != value
    ]

"""``model.json``: what model the weights of a checkpoint are of."""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from triptych.checkpoints.layout import CheckpointFolder
from triptych.configs.model_schema import (
    COLOURS,
    LanguageConfig,
    ModelConfig,
    TokensConfig,
    VisionConfig,
    VisionMLP,
    VisionNorm,
)
from triptych.errors import CheckpointError


def write_model(path: Path, model: ModelConfig) -> None:
    """Write it beside the weights."""
    path.write_text(json.dumps(plain(model), indent=1) + "\n")


def plain(model: ModelConfig) -> dict[str, Any]:
    """The model as JSON and YAML have it: choices by their names, as in the configuration."""
    return asdict(model, dict_factory=lambda items: {key: _shown(value) for key, value in items})


def read_model(folder: Path) -> ModelConfig:
    """The model of the checkpoint in ``folder``.

    Raises:
        CheckpointError: the file is missing, or of another version of this project.
    """
    path = CheckpointFolder(folder).model
    try:
        content = json.loads(path.read_text())
        return ModelConfig(
            name=content["name"],
            vision=_vision(content["vision"]),
            language=LanguageConfig(**content["language"]),
            tokens=TokensConfig(**content["tokens"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe a model: {error}") from error


def differences(folder: Path, model: ModelConfig) -> list[str]:
    """Sizes, and what no tensor shows: heads, rotary base and sections, epsilon, token ids."""
    theirs, ours = asdict(read_model(folder)), asdict(model)
    return [
        f"model.{group}.{key}={_shown(value)}, the checkpoint has {_shown(theirs[group][key])}"
        for group in ("vision", "language", "tokens")
        for key, value in ours[group].items()
        if theirs[group][key] != value
    ]


def _shown(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def _vision(content: dict[str, Any]) -> VisionConfig:
    """The tower; what is absent was not yet a choice when the file was written.

    Files of those days say that pictures have three channels.

    Raises:
        KeyError: a norm or an MLP that this project does not have.
        ValueError: other than three channels.
    """
    sizes = dict(content)
    if sizes.pop("in_channels", COLOURS) != COLOURS:
        raise ValueError(f"in_channels={content['in_channels']}; known is {COLOURS}")
    norm = VisionNorm[sizes.pop("norm", VisionConfig().norm.name)]
    mlp = VisionMLP[sizes.pop("mlp", VisionConfig().mlp.name)]
    return VisionConfig(norm=norm, mlp=mlp, **sizes)

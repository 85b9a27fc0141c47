"""From a command line to one typed ``Config``, by way of the YAML groups in this folder.

Hydra composes, and goes no further than this module. It changes no folder and writes no file.
"""

import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from triptych.configs.former_keys import former_keys
from triptych.configs.overrides import checked_overrides
from triptych.configs.problems import Problem, either, refusal
from triptych.configs.schema import Config
from triptych.configs.usage import usage
from triptych.errors import ConfigError

FOLDER = Path(__file__).parent

_SCHEMA = OmegaConf.structured(Config)
ConfigStore.instance().store(name="schema", node=_SCHEMA)


def load_config(argv: Sequence[str]) -> Config:
    """The configuration that a command line asks for, resolved and typed, not yet validated.

    ``--help`` and ``--print-config`` print and exit.

    Args:
        argv: overrides and options, without the program's name: ``["stage=2", "parallel.tp=2"]``.
    Raises:
        ConfigError: there is no such key or choice; a value has the wrong type, or is missing.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", type=Path, action="append", default=[])
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    options, words = parser.parse_known_args(argv)

    own_folders = [_own_folder(folder) for folder in options.config_dir]
    _refuse_same_names(own_folders)
    choices = _choices([FOLDER, *own_folders])
    if options.help:
        _print_and_exit(usage(choices, _default_choices()))
    config = _compose(checked_overrides(words, choices), own_folders)
    if options.print_config:
        _print_and_exit(_to_yaml(config))
    return config


def save_config(config: Config, path: Path) -> None:
    """Write every value of a run, resolved, as YAML."""
    path.write_text(_to_yaml(config))


def read_config(path: Path) -> Config:
    """Read back what ``save_config`` wrote.

    Raises:
        ConfigError: no such file, not YAML, not the configuration of a run, or one with keys that
            have other names by now; names them.
    """
    try:
        content: Any = OmegaConf.load(path)
        if former := list(former_keys(content)):
            raise ConfigError(
                "\n  ".join([f"{path} was written by an earlier version; of its keys", *former])
                + "\n  -> use the version that wrote it, or resume the run: its next checkpoint has"
                " today's keys"
            )
        return _typed(OmegaConf.merge(OmegaConf.structured(Config), content))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        raise ConfigError(f"{path} is not the configuration of a run: {_plain(error)}") from error


class _Parser(ArgumentParser):
    """Options only; complains the way everything here does."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(f"{message}; --help lists the options")


def _print_and_exit(text: str) -> NoReturn:
    """Print once, however many ranks are asked, and end the process."""
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text)
    sys.exit(0)


def _choices(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Group -> its choices, over all folders."""
    groups = sorted(path.name for path in FOLDER.iterdir() if any(path.glob("*.yaml")))
    return {
        group: sorted(path.stem for folder in folders for path in folder.glob(f"{group}/*.yaml"))
        for group in groups
    }


def _default_choices() -> dict[str, str]:
    """Group -> the choice taken when the command line names none."""
    config: Any = OmegaConf.load(FOLDER / "config.yaml")
    return {
        group: name
        for entry in config.defaults
        if entry not in ("schema", "_self_")
        for group, name in entry.items()
    }


def _own_folder(folder: Path) -> Path:
    """The user's folder of YAML groups, absolute.

    Raises:
        ConfigError: it holds none, or one with the name of a choice of ours.
    """
    groups = list(_choices([FOLDER]))
    files = [path for group in groups for path in folder.glob(f"{group}/*.yaml")]
    if not files:
        wanted = either([f"{group}/NAME.yaml" for group in groups])
        raise ConfigError(f"--config-dir {folder} holds no configuration: no {wanted}")
    shadows = [str(path) for path in files if (FOLDER / path.relative_to(folder)).exists()]
    if shadows:
        raise ConfigError(f"{', '.join(shadows)}: this name is built in; give the file another one")
    return folder.resolve()


def _refuse_same_names(folders: Sequence[Path]) -> None:
    """Hydra would take the first file of a name, whichever was meant.

    Raises:
        ConfigError: two folders have a choice of the same name.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*/*.yaml")):
            other = found.setdefault(path.relative_to(folder), folder)
            if other != folder:
                raise ConfigError(
                    f"{path} and {other / path.relative_to(folder)} are the same choice"
                    "  -> give one of the files another name"
                )


def _compose(overrides: Sequence[str], own_folders: Sequence[Path]) -> Config:
    """Merge YAML and overrides into the schema, and resolve."""
    paths = ["'file://" + str(folder).replace("'", r"\'") + "'" for folder in own_folders]
    try:
        with initialize_config_module("triptych.configs", version_base="1.3"):
            composed = compose("config", [*overrides, f"hydra.searchpath=[{','.join(paths)}]"])
        _derive_head_dim(composed.model.language)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise refusal([Problem(f"{key} is missing", f"{key}=VALUE") for key in missing])
        return _typed(composed)
    except OverrideParseException as error:
        problem = Problem(f"{error.override} cannot be read", "KEY='VALUE', in single quotes")
        raise refusal([problem]) from error
    except (HydraException, OmegaConfBaseException, AttributeError, YAMLError) as error:
        raise ConfigError(_plain(error)) from error


def _derive_head_dim(language: Any) -> None:
    """As hidden_size / num_heads, where it is not given; rules say what must divide."""
    given = {key for key in language if not OmegaConf.is_missing(language, key)}
    if "head_dim" not in given and {"hidden_size", "num_heads"} <= given:
        language.head_dim = language.hidden_size // max(1, language.num_heads)


def _typed(composed: Any) -> Config:
    """The dataclasses of a merged configuration."""
    resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    # merged again: what an interpolation gives has not been checked against the schema
    config = OmegaConf.to_object(OmegaConf.merge(_SCHEMA, resolved))
    assert isinstance(config, Config)
    config.data.mixtures = _as_floats(config.data.mixtures)
    return config


def _as_floats(mixtures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mixtures, every weight a float.

    Raises:
        ConfigError: some are no numbers; lists them all.
    """
    problems = [
        Problem(f"{key}={weight} must be a number", f"{key}=1.0")
        for stage, weights in mixtures.items()
        for source, weight in weights.items()
        for key in [f"data.mixtures.{stage}.{source}"]
        if isinstance(weight, bool) or not isinstance(weight, int | float)
    ]
    if problems:
        raise refusal(problems)
    return {
        stage: {source: float(weight) for source, weight in weights.items()}
        for stage, weights in mixtures.items()
    }


def _to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _plain(error: BaseException) -> str:
    """Where it is wrong, and what; without the library's advice, which is not ours."""
    told = str(error)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    override = re.match(r"Error merging override \+*(.*)|Could not override '(.*)'", told)
    file = re.match(r"In '(.*)': .*\n(.*)", told)
    key = re.search(r"full_key: (\S+)", told)
    if isinstance(cause, YAMLError):
        return re.sub(r"\s+", " ", told)
    if override:
        return f"{override[1] or override[2]}: {str(cause).partition(chr(10))[0]}"
    if file:
        return f"{file[1]}.yaml: {key[1] + ': ' if key else ''}{file[2]}"
    return (f"{key[1]}: " if key else "") + told.partition("\n")[0]

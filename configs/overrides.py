"""The words of a command line: which of them name something, and what the others may have meant.

Types of values are not looked at here; OmegaConf checks them against the schema.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, get_origin, get_type_hints

from triptych.configs.habits import habit_problems, plain_name
from triptych.configs.problems import Problem, either, refusal
from triptych.configs.schema import Config

OVERRIDE = re.compile(r"(?P<prefix>\+{0,2})(?P<key>[\w.]+)=(?P<value>.*)", re.DOTALL)

WEIGHTS = {
    "data.mixtures": "data.mixtures.STAGE.SOURCE",
    "data.validation": "data.validation.SOURCE",
}
"""Mappings whose names are the user's own -> how one of their weights is called."""

Choices = Mapping[str, Sequence[str]]
"""Group -> the names of its YAML files."""


def checked_overrides(words: Sequence[str], choices: Choices) -> list[str]:
    """The words in the form that Hydra takes.

    Raises:
        ConfigError: some name no key, group or choice. Lists them all, with the nearest that exist.
    """
    problems = [problem for word in _joined(words) for problem in _problems(word, choices)]
    for group in choices:
        given = [word for word in words if word.startswith(f"{group}=")]
        if len(given) > 1:
            problems.append(Problem(f"{' '.join(given)}: a run has one {group}", either(given)))
    if problems:
        raise refusal(problems)
    return [_for_hydra(word, choices) for word in words]


def schema_keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the configuration that holds a value, dotted: ``parallel.tp``, ..."""
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from schema_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]  # hints are types
        else:
            yield f"{prefix}{name}"


def _problems(word: str, choices: Choices) -> Iterator[Problem]:
    """What is wrong with one word."""
    match = OVERRIDE.fullmatch(word)
    if word.startswith("-"):
        yield _problem_of_option(word)
    elif word.startswith("~"):
        yield Problem(f"{word}: no key can be removed", "KEY=null, where the key may be empty")
    elif match is None:
        yield Problem(f"{word} is no override", "KEY=VALUE")
    elif match["key"] in choices:
        yield from _choice_problems(word, match, choices[match["key"]])
    elif len(_kinds(match["key"])) < match["key"].count(".") + 1:
        known = [*choices, *schema_keys()]
        near = [f"{key}={match['value']}" for key in _nearest(match["key"], known)]
        unknown = Problem(
            f"{word}: there is no key {match['key']}",
            either(near) if near else "--print-config, which prints all keys",
        )
        yield next(habit_problems(word, match["key"], match["value"]), unknown)
    elif match["key"].startswith(tuple(WEIGHTS)):
        yield from _weight_problems(word, match)
    elif is_dataclass(_kinds(match["key"])[-1]) and not match["value"].startswith("{"):
        names = get_type_hints(_kinds(match["key"])[-1])
        yield Problem(
            f"{word}: {match['key']} holds several values",
            either([f"{match['key']}.{name}=VALUE" for name in names][:3]),
        )
    elif "," in match["value"] and not re.search(r"[\[\]{}()'\"]", match["value"]):
        yield Problem(
            f"{word}: a run has one value for each key",
            f"{match['key']}=[{match['value']}] for a list",
        )


def _joined(words: Sequence[str]) -> Iterator[str]:
    """``--max_steps 10``, as other tools take it, in one word."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if re.fullmatch(r"--[\w.-]+", word) and rest and not re.match(r"[-~]|\+*[\w.]+=", rest[0]):
            word = f"{word}={rest.pop(0)}"
        yield word


def _problem_of_option(word: str) -> Problem:
    """With ``--max_steps=10`` or ``--bf16``, as other tools take them: the key that does it."""
    key, _, given = word.partition("=")
    value = given or "VALUE"
    same = [f"{name}={value}" for name in schema_keys() if plain_name(name) == plain_name(key)]
    remedy = either(same) if same else "--help"
    return next(habit_problems(word, key, value), Problem(f"{word} is no option", remedy))


def _choice_problems(word: str, match: re.Match[str], names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with ``group=choice``."""
    group, name = match["key"], match["value"].strip("'\"")
    if name not in names:
        near = [f"{group}={other}" for other in get_close_matches(name, names) or names]
        yield Problem(f"{word}: {group} has no choice {name}", either(near))
    elif match["prefix"]:
        yield Problem(f"{word}: {group} is chosen already", f"{group}={name}")


def _weight_problems(word: str, match: re.Match[str]) -> Iterator[Problem]:
    """What is wrong with ``data.mixtures.STAGE.SOURCE=WEIGHT``."""
    form = next(form for key, form in WEIGHTS.items() if match["key"].startswith(key))
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", match["value"], re.IGNORECASE)
    if number is None or match["key"].count(".") != form.count("."):
        yield Problem(f"{word}: weights are numbers, one source at a time", f"{form}=1.0")


def _for_hydra(word: str, choices: Choices) -> str:
    """One word in Hydra's grammar.

    There an integer is no choice of a group nor a weight, and a new name has ``++`` before it.
    """
    prefix, key, value = OVERRIDE.fullmatch(word).groups()  # type: ignore[union-attr]  # it matched
    if key in choices and value.isdecimal():
        return f"{key}='{value}'"
    if key.startswith(tuple(WEIGHTS)):
        return f"++{key}={float(value)}"
    return f"{prefix}{key}={value}"


def _kinds(key: str) -> list[Any]:
    """The types that the parts of a dotted key have, up to the first part that the schema lacks."""
    kinds: list[Any] = []
    kind: Any = Config
    for name in key.split("."):
        if get_origin(kind) is dict:
            kind = kind.__args__[1]
        elif is_dataclass(kind) and name in get_type_hints(kind):
            kind = get_type_hints(kind)[name]
        else:
            break
        kinds.append(kind)
    return kinds


def _nearest(key: str, known: Sequence[str]) -> list[str]:
    """At most three keys that may have been meant: the same last name, else nearly the same."""
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    return (same or get_close_matches(key, known))[:3]

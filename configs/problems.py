"""How problems of a configuration are told: all at once, one line each, with what fixes it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from triptych.errors import ConfigError

LONG_RULE = 100
"""Characters; the remedy of a longer rule does not move those of the others to the right."""


class Problem(NamedTuple):
    """One broken rule."""

    rule: str
    """What was given, and the bound it breaks: ``parallel.tp=3 must divide num_heads=28``."""
    remedy: str
    """What to type instead; reads on after "try"."""


def refusal(problems: Sequence[Problem]) -> ConfigError:
    """One error that lists every problem, the remedies in a column of their own."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    width = max(
        (len(problem.rule) for problem in problems if len(problem.rule) <= LONG_RULE), default=0
    )
    lines = [f"  {problem.rule:<{width}}  -> try {problem.remedy}" for problem in problems]
    return ConfigError("\n".join([f"{count} in this run", *lines]))


def from_hub(name: str) -> str:
    """How a model of the hub comes into a folder, where ``name`` may be one: no path that exists.

    Reads on after a remedy.
    """
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None or Path(name).parent.exists():
        return ""
    return f"; from the hub: hf download {name} --local-dir {name.partition('/')[2]}"


def either(choices: Sequence[object]) -> str:
    """``a, b or c``."""
    words = [str(choice) for choice in choices]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def typed_list(values: Sequence[object]) -> str:
    """A list as it is typed on a command line: without spaces."""
    return f"[{','.join(map(str, values))}]"

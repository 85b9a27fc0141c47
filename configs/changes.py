"""What differs between the configuration of a checkpoint and that of the run that resumes it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from triptych.configs.problems import typed_list
from triptych.configs.schema import Config

OF_A_START = ("resume", "init.", "data.accept_new_plan")
"""What only says how to start, each time anew."""


class Change(NamedTuple):
    """A key and its two values; "none" where one of the two has no such key."""

    key: str
    before: str
    now: str


def changes(saved: Path, config: Config) -> list[Change]:
    """The keys that differ, in the order of the schema.

    Args:
        saved: what ``save_config`` wrote, of this version or an earlier one.
        config: of now.
    """
    before = saved_values(saved)
    now = dict(_values(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)))
    return [
        Change(key, before.get(key, "none"), now.get(key, "none"))
        for key in {**now, **before}
        if before.get(key) != now.get(key) and not key.startswith(OF_A_START)
    ]


def saved_values(saved: Path) -> dict[str, str]:
    """Dotted keys of what ``save_config`` wrote, and what they hold, as it is typed."""
    return dict(_values(OmegaConf.to_container(OmegaConf.load(saved))))


def table(found: list[Change]) -> str:
    """One change per line, indented, the values in a column."""
    width = max((len(change.key) for change in found), default=0)
    return "\n".join(f"  {key:<{width}}  {before} -> {now}" for key, before, now in found)


def _values(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and what they hold, as it is typed."""
    if isinstance(node, Mapping) and (node or not prefix):
        for name, value in node.items():
            yield from _values(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, _typed(node)


def _typed(value: Any) -> str:
    """A value as it stands on a command line."""
    if isinstance(value, list):
        return typed_list(value)
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )

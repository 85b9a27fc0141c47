"""Chats whose calls stand beside the content of a turn, as OpenAI's API and Qwen's templates do."""

from collections.abc import Mapping
from typing import Any

from triptych.errors import DataError

OF_OPENAI = frozenset({"tool_calls", "tool_call_id"})
"""Keys of a turn that no other format has."""


def from_openai(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """``tool_calls`` become parts of the turn; ``tool_call_id`` is that of a call before it."""
    turns, open_ids = [], list[Any]()
    for i, turn in enumerate(_listed(record.get("messages"), "messages")):
        where = f"messages[{i}]"
        if not isinstance(turn, Mapping):
            raise DataError(f"{where} must be an object")
        calls = _listed(turn.get("tool_calls") or [], f"{where}.tool_calls")
        kept = {key: value for key, value in turn.items() if key not in OF_OPENAI}
        if turn.get("role") == "tool":
            kept.pop("name", None)  # the call has it
            _check_id(turn, open_ids, where)
        else:
            open_ids = [call.get("id") for call in calls if isinstance(call, Mapping)]
        if calls:
            said = turn.get("content")
            said = [{"type": "text", "text": said}] if isinstance(said, str) and said else said
            made = [_call(call, f"{where}.tool_calls[{k}]") for k, call in enumerate(calls)]
            kept["content"] = [*(said or []), *made]
        turns.append(kept)
    return {**record, "messages": turns}


def _call(call: Any, where: str) -> Mapping[str, Any]:
    """``{"function": {"name": ..., "arguments": ...}}``, or what is in it alone."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not {"name", "arguments"} <= inner.keys():
        raise DataError(f"{where} must have a function with name and arguments")
    return {"type": "call", "name": inner["name"], "arguments": inner["arguments"]}


def _check_id(turn: Mapping[str, Any], open_ids: list[Any], where: str) -> None:
    """Answers stand in the order of their calls, because the model is not shown the ids."""
    found = turn.get("tool_call_id")
    expected = open_ids.pop(0) if open_ids else None
    if found is not None and found != expected:
        raise DataError(
            f"{where}.tool_call_id is {found!r}, the next call that is not answered is "
            f"{expected!r}  -> answers in the order of their calls"
        )


def _listed(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list")
    return value

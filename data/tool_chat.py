r"""Chats beside declared tools, in the form of Qwen2.5; without ``tools`` see ``data/chat.py``.

    <|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n\n...\n<tools>\n{...}\n</tools>...
    <|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call><|im_end|>\n
    <|im_start|>user\n<tool_response>\na cat\n</tool_response><|im_end|>\n
    <|im_start|>assistant\nA cat.<|im_end|>\n

Targets are the turns of the assistant with their calls. Several tools answer in one turn. Where the
tokenizer has ``<tool_call>`` as one token, it is one, here as in any text.

Source: the chat template of Qwen2.5, with single braces in the line that explains a call;
tests/data/golden_tools.json.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from triptych.data.parts import SequenceWriter, parts_of, write_content, write_part
from triptych.data.tokenizer import SYSTEM_PROMPT
from triptych.errors import DataError

BEFORE = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
"""What stands in the system turn around the declarations, a line each."""


class ToolChatWriter:
    """Writes turn after turn, in which only declared tools are called."""

    def __init__(self, writer: SequenceWriter, tools: Any, *, line_end_is_target: bool) -> None:
        """Writes nothing yet.

        Args:
            writer: takes the chat.
            tools: declarations, as OpenAI's or the bare functions of them; or JSON of a list.
            line_end_is_target: so is the line end after what the assistant says.
        Raises:
            DataError: a declaration is malformed.
        """
        self._writer = writer
        self._line_end_is_target = line_end_is_target
        self._tools = _declarations(tools)
        self._names = {_name(tool, f"tools[{i}]") for i, tool in enumerate(self._tools)}
        self._num_calls = self._num_observed = 0

    @property
    def is_observed(self) -> bool:
        """A tool has spoken last."""
        return self._num_observed > 0

    def write(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Write all turns, whose roles are known.

        Raises:
            DataError: a turn is malformed, or calls and observations do not fit.
        """
        has_system = messages[0]["role"] == "system"
        self._system(messages[0]["content"] if has_system else SYSTEM_PROMPT)
        for i, message in enumerate(messages[has_system:], start=int(has_system)):
            role, content, where = message["role"], message["content"], f"messages[{i}]"
            if role == "tool":
                following = messages[i + 1]["role"] if i + 1 < len(messages) else ""
                self._observe(content, where, is_last=following != "tool")
                continue
            self._begin(role)
            self._num_calls = self._num_observed = 0
            if role == "assistant":
                self._answer(content, f"{where}.content")
            else:
                write_content(self._writer, content, f"{where}.content", target=False)
            self._end(answers=role == "assistant")

    def _system(self, content: Any) -> None:
        self._begin("system")
        write_content(self._writer, content, "messages[0].content", target=False)
        lines = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in self._tools)
        self._writer.text(BEFORE + lines + AFTER, target=False)
        self._end(answers=False)

    def _answer(self, content: Any, where: str) -> None:
        for k, part in enumerate(parts_of(content, where)):
            if part.get("type") == "call":
                self._num_calls += 1
                self._writer.text("\n" * (k > 0) + self._call(part, f"{where}[{k}]"), target=True)
            else:
                write_part(self._writer, part, f"{where}[{k}]", target=True)

    def _call(self, part: Mapping[str, Any], where: str) -> str:
        name, arguments = part.get("name"), _parsed(part.get("arguments"))
        if name not in self._names:
            known = ", ".join(sorted(self._names))
            raise DataError(f"{where} calls {name!r}, which tools does not declare; it has {known}")
        if not isinstance(arguments, Mapping):
            raise DataError(
                f"{where} calls {name} with arguments that are no object, nor JSON of one"
            )
        spelled = json.dumps(arguments, ensure_ascii=False)
        return f'<tool_call>\n{{"name": "{name}", "arguments": {spelled}}}\n</tool_call>'

    def _observe(self, content: Any, where: str, *, is_last: bool) -> None:
        """What a tool says, to the user's side; tools that answer together share a turn."""
        self._num_observed += 1
        if self._num_observed > self._num_calls or (
            is_last and self._num_observed < self._num_calls
        ):
            raise DataError(
                f"{where} is what a tool says, number {self._num_observed} after "
                f"{self._num_calls} calls  -> one turn of tool for each call, right after them"
            )
        if self._num_observed == 1:
            self._begin("user")
        self._writer.text("\n" * (self._num_observed > 1) + "<tool_response>\n", target=False)
        write_content(self._writer, content, f"{where}.content", target=False)
        self._writer.text("\n</tool_response>", target=False)
        if is_last:
            self._end(answers=False)

    def _begin(self, role: str) -> None:
        self._writer.special(self._writer.tokens.im_start)
        self._writer.text(f"{role}\n", target=False)

    def _end(self, *, answers: bool) -> None:
        self._writer.special(self._writer.tokens.im_end, target=answers)
        self._writer.text("\n", target=answers and self._line_end_is_target)


def _declarations(tools: Any) -> list[Any]:
    tools = _parsed(tools)
    if not isinstance(tools, list) or not tools:
        raise DataError("tools must be a list of declarations, or JSON of one")
    return tools


def _name(tool: Any, where: str) -> str:
    """Of a declaration: ``{"type": "function", "function": {"name": ...}}``, or the inner one."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise DataError(
            f'{where} names no function  -> {{"type": "function", "function": {{"name": NAME, '
            '"description": TEXT, "parameters": {...}}}'
        )
    return name


def _parsed(value: Any) -> Any:
    """JSON that is spelled in a string; None where it is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None

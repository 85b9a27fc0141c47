r"""Chats in ChatML, and which of their tokens are targets.

    <|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n
    <|im_start|>assistant\nA cat.<|im_end|>\n                        targets: A cat.<|im_end|>

A call and what comes of it are one turn, as Qwen-Agent writes it for Qwen2-VL:

    <|im_start|>assistant\n✿FUNCTION✿: look\n✿ARGS✿: {}\n✿RESULT✿: a cat\n✿RETURN✿: A.<|im_end|>\n
        targets: ✿FUNCTION✿: look\n✿ARGS✿: {}\n✿RESULT✿        and        : A.<|im_end|>

It stops the model at ``✿RESULT✿``, which therefore is learned, and has it go on after ``✿RETURN✿``,
with the colon.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from triptych.data.parts import Encoded, SequenceWriter, parts_of, write_content, write_part
from triptych.data.tokenizer import SYSTEM_PROMPT, Tokenizer
from triptych.data.tool_chat import ToolChatWriter
from triptych.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
RESULT, RETURN = "✿RESULT✿", "✿RETURN✿"


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Any = None,
    line_end_is_target: bool = False,
) -> Encoded:
    """Encodes ChatML. Targets are what the assistant says, and the ``<|im_end|>`` it closes with.

    Args:
        messages: ``{"role": ..., "content": ...}``; content is a string or a list of the parts of
            ``data.parts``.
        tokenizer: for the text.
        tools: what may be called. With these the chat is in the form of ``data.tool_chat``.
        line_end_is_target: so is the line end after it. Inference stops before, so it teaches
            nothing that is used; some trainers count it.
    Raises:
        DataError: a turn is malformed, none is the assistant's, or an observation is the last.
    """
    writer = SequenceWriter(tokenizer)
    _check_turns(messages)
    chat: _ChatWriter | ToolChatWriter
    if tools:
        chat = ToolChatWriter(writer, tools, line_end_is_target=line_end_is_target)
    else:
        chat = _ChatWriter(writer, line_end_is_target=line_end_is_target)
    chat.write(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("messages have no assistant turn: there is nothing to learn from them")
    if chat.is_observed:
        raise DataError("messages end with what a tool says  -> add what the assistant answers")
    return writer.finish()


def encode_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Encoded:
    """Encodes ChatML up to where the assistant's answer begins; nothing is a target."""
    writer = SequenceWriter(tokenizer)
    _check_turns(messages)
    chat = _ChatWriter(writer, line_end_is_target=False)
    chat.write(messages)
    if not chat.is_observed:
        writer.special(tokenizer.tokens.im_start)
        writer.text("assistant\n", target=False)
    prompt = writer.finish()
    return Encoded(prompt.input_ids, np.zeros_like(prompt.targets), prompt.media)


def _check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError("messages must be a list of turns, and not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise DataError(f"messages[{i}] must be an object with role and content")
        if message["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise DataError(f"messages[{i}].role is {message['role']!r}; it must be one of {known}")


class _ChatWriter:
    """Writes turn after turn; calls, observations and the answer to them share one."""

    def __init__(self, writer: SequenceWriter, *, line_end_is_target: bool) -> None:
        self._writer = writer
        self._line_end_is_target = line_end_is_target
        self._num_calls = self._num_observed = 0

    @property
    def is_observed(self) -> bool:
        """The last calls have been answered by their tools, and the assistant not yet goes on."""
        return 0 < self._num_calls == self._num_observed

    def write(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Write all turns, whose roles are known.

        Raises:
            DataError: a turn is malformed, or calls and observations do not fit.
        """
        for i, message in enumerate(messages):
            role, where = message["role"], f"messages[{i}]"
            if i == 0 and role != "system":
                self._turn("system", SYSTEM_PROMPT, "")
                self._end("system", "")
            if role == "tool":
                self._observe(message["content"], where)
            else:
                self._turn(role, message["content"], where)
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool":
                self._end(role, where)

    def _turn(self, role: str, content: Any, where: str) -> None:
        """A turn up to its end."""
        answers, goes_on = role == "assistant", self.is_observed
        if goes_on and not answers:
            raise DataError(
                f"{where} is of {role}, but after what a tool says the assistant goes on"
            )
        if goes_on:
            self._writer.text(": ", target=True)
        else:
            self._writer.special(self._writer.tokens.im_start)
            self._writer.text(f"{role}\n", target=False)
        self._num_calls = self._num_observed = 0
        if not answers:
            write_content(self._writer, content, f"{where}.content", target=False)
            return
        for k, part in enumerate(parts_of(content, f"{where}.content")):
            if part.get("type") == "call":
                self._num_calls += 1
                self._writer.text("\n" if goes_on or k else "", target=True)
            write_part(self._writer, part, f"{where}.content[{k}]", target=True)

    def _observe(self, content: Any, where: str) -> None:
        """What a tool says."""
        if self._num_observed == self._num_calls:
            raise DataError(
                f"{where} is what a tool says, but {self._num_calls} calls stand before it and "
                f'{self._num_observed} are answered  -> a part {{"type": "call", "name": NAME, '
                '"arguments": {...}}} of the assistant for each turn of tool'
            )
        self._writer.text(f"\n{RESULT}", target=self._num_observed == 0)
        self._writer.text(": ", target=False)
        write_content(self._writer, content, f"{where}.content", target=False)
        self._num_observed += 1
        if self.is_observed:
            self._writer.text(f"\n{RETURN}", target=False)

    def _end(self, role: str, where: str) -> None:
        """Ends the turn, unless the assistant goes on in it."""
        if self.is_observed:
            return
        if role == "tool":
            raise DataError(
                f"{where}: {self._num_observed} of {self._num_calls} calls are answered"
                "  -> one turn of tool for each call"
            )
        answers = role == "assistant"
        self._writer.special(self._writer.tokens.im_end, target=answers)
        self._writer.text("\n", target=answers and self._line_end_is_target)

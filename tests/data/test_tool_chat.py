"""Chats beside declared tools: the text that Qwen2.5's own template gives, and the targets."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from triptych.data.prepare.foreign import NOTHING, check_record
from triptych.data.prepare.inputs.record_formats import convert
from triptych.data.tokenizer import SYSTEM_PROMPT, load_tokenizer, train_tokenizer
from triptych.data.tokens import encode_record
from triptych.errors import DataError

GOLDEN = json.loads(Path(__file__).with_name("golden_tools.json").read_text())
TOOLS, CHATS = GOLDEN["tools"], GOLDEN["chats"]
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["<tool_call> arguments", SYSTEM_PROMPT] * 3, path, vocab_size=300)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def oracle(folder):
    return AutoTokenizer.from_pretrained(folder)


def encoded(record, tokenizer):
    _, ours = convert(record, None, frozenset())
    check_record(ours, NOTHING)
    return encode_record(ours, tokenizer)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["listed", "spelled"])
@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_the_published_template_and_answers_are_targets(
    tokenizer, oracle, name, tools
):
    chat = CHATS[name]
    pieces = ANSWER.split(chat["rendered"])
    sample = encoded({"messages": chat["messages"], "tools": tools}, tokenizer)
    assert sample.input_ids.tolist() == oracle(chat["rendered"]).input_ids
    lengths = [len(oracle(piece).input_ids) for piece in pieces]
    targets = np.repeat(np.arange(len(pieces)) % 2, lengths)
    assert sample.targets.tolist() == targets.tolist()
    assert sum(turn["role"] == "assistant" for turn in chat["messages"]) == len(pieces) // 2


def test_without_a_system_turn_it_is_ours_and_the_line_end_a_target_where_asked_for(tokenizer):
    chat = CHATS["nothing is called"]["messages"]
    record = {"messages": chat[1:], "tools": TOOLS}
    assert chat[0]["content"] == SYSTEM_PROMPT
    expected = encode_record({"messages": chat, "tools": TOOLS}, tokenizer)
    assert encode_record(record, tokenizer).input_ids.tolist() == expected.input_ids.tolist()
    more = encode_record(record, tokenizer, line_end_is_target=True)
    assert more.targets.tolist() == [*expected.targets[:-1].tolist(), 1]
    assert expected.targets[-1] == 0


def test_no_tools_is_a_chat_without():
    plain = {"messages": CHATS["nothing is called"]["messages"]}
    assert convert({**plain, "tools": []}, None, frozenset())[1] == {**plain, "tools": []}


def test_arguments_that_json_spells_are_those_of_the_object(tokenizer):
    chat = json.loads(json.dumps(CHATS["two calls at once"]))
    expected = encoded({"messages": chat["messages"], "tools": TOOLS}, tokenizer)
    for number, call in enumerate(chat["messages"][2]["tool_calls"]):
        call["id"] = f"call_{number}"
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        chat["messages"][3 + number] |= {"tool_call_id": f"call_{number}", "name": "x"}
    chat["messages"][2]["content"] = None
    spelled = encoded({"messages": chat["messages"], "tools": TOOLS}, tokenizer)
    assert spelled.input_ids.tolist() == expected.input_ids.tolist()


def test_a_tool_may_answer_with_a_picture(tokenizer, oracle):
    chat = json.loads(json.dumps(CHATS["a thought, a call, an answer"]))
    chat["messages"][3]["content"] = [{"type": "image", "image": "a.png"}]
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    rendered = chat["rendered"].replace("The map is open.", shown)
    sample = encoded({"messages": chat["messages"], "tools": TOOLS}, tokenizer)
    assert sample.input_ids.tolist() == oracle(rendered).input_ids
    assert [item.path for item in sample.media] == ["a.png"]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def calls(*names):
    return turn("assistant", [{"type": "call", "name": name, "arguments": {}} for name in names])


ASK = turn("user", "Go.")
WITH_ID = turn("assistant", "", tool_calls=[{"id": "a", "name": "tap", "arguments": {}}])
BAD = {
    "not declared": ([ASK, calls("swipe")], TOOLS, r"\[0\] calls 'swipe', .* it has tap, wetter"),
    "arguments": (
        [ASK, turn("assistant", [{"type": "call", "name": "tap", "arguments": "x=5"}])],
        TOOLS,
        "calls tap with arguments that are no object",
    ),
    "one answer too few": (
        [ASK, calls("tap", "tap"), turn("tool", "a"), turn("assistant", "b")],
        TOOLS,
        r"messages\[2\] is what a tool says, number 1 after 2 calls",
    ),
    "one answer too many": (
        [ASK, calls("tap"), turn("tool", "a"), turn("tool", "b"), turn("assistant", "c")],
        TOOLS,
        r"messages\[3\] is what a tool says, number 2 after 1 calls",
    ),
    "a tool first": ([turn("tool", "a"), calls("tap")], TOOLS, "number 1 after 0 calls"),
    "a tool last": ([ASK, calls("tap"), turn("tool", "a")], TOOLS, "messages end with what a tool"),
    "a call of the user": (
        [turn("user", [{"type": "call", "name": "tap", "arguments": {}}])],
        TOOLS,
        "is a call, which only a turn of the assistant can make",
    ),
    "no list": ([ASK, calls("tap")], "tap", "tools must be a list of declarations"),
    "no name": ([ASK, calls("tap")], [{"function": {}}], r"tools\[0\] names no function"),
    "wrong id": (
        [ASK, WITH_ID, turn("tool", "a", tool_call_id="b"), turn("assistant", "b")],
        TOOLS,
        r"openai: messages\[2\].tool_call_id is 'b', the next call .* is 'a'",
    ),
    "half a call": (
        [ASK, turn("assistant", "", tool_calls=[{"name": "tap"}])],
        TOOLS,
        r"openai: messages\[1\].tool_calls\[0\] must have a function with name and arguments",
    ),
    "calls that are none": (
        [ASK, turn("assistant", "", tool_calls="tap")],
        TOOLS,
        "must be a list",
    ),
}


@pytest.mark.parametrize(("turns", "tools", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(tokenizer, turns, tools, message):
    with pytest.raises(DataError, match=message):
        encoded({"messages": turns, "tools": tools}, tokenizer)


def test_tools_beside_no_messages_are_refused():
    with pytest.raises(DataError, match="the record has tools besides, which nothing reads"):
        check_record({"text": "a", "tools": TOOLS}, NOTHING)

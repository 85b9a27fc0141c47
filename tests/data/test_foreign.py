"""What other tools write is told apart, with how it is written here; nothing passes in silence."""

import gzip
import json
import re

import pytest

from triptych.data.prepare.foreign import Allowed, check_record
from triptych.data.prepare.inputs.readers import container_of
from triptych.errors import DataError

PART = '{"type": "image", "image": PATH}'
USER = {"role": "user", "content": "<image>What is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}
LLAVA = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
URL = {"type": "image_url", "image_url": {"url": "https://host/cat.jpg"}}


def chat(*parts: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


def image(value: object) -> dict[str, object]:
    return {"type": "image", "image": value}


RECORDS = {
    "sharegpt as messages": (
        {"messages": LLAVA},
        "ShareGPT's, with from and value",
        "messages|role",
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "", "output": "4"},
        "Alpaca's",
        "as a turn of user",
    ),
    "image_url": (chat(URL), r"messages[0].content[0] is OpenAI's, with image_url", PART),
    "responses": (chat({"type": "input_image"}), "OpenAI's", PART),
    "data url": (chat(image("data:image/png;base64,iVBORw0KGgo=")), "base64", PART),
    "base64": (chat(image("iVBORw0KGgo" * 40 + "==")), "base64", PART),
    "bytes": (chat(image({"bytes": "iVBO", "path": None})), "base64", PART),
    "key": ({"text": "a", "url": "b", "lang": "c"}, "has url, lang", "--ignore-keys url lang"),
    "key of a turn": (
        {"messages": [{**ANSWER, "loss": 0}]},
        "messages[0] has loss",
        "--ignore-keys",
    ),
    "key of a part": (
        chat({**image("a.png"), "resized_height": 28}),
        "[0] has resized_height",
        "--ig",
    ),
}


@pytest.mark.parametrize(("record", "told", "remedy"), RECORDS.values(), ids=RECORDS)
def test_a_record_of_another_tool_is_named(record, told, remedy):
    with pytest.raises(DataError, match=re.escape(told)) as refused:
        check_record(record, Allowed())
    advice = str(refused.value).partition("  -> ")[2]
    assert any(words in advice for words in remedy.split("|"))


SPELLED = ["<image>", "<video>", "<image_1>", "<image 2>", "<img>", "<|image_pad|>", "<ImageHere>"]


@pytest.mark.parametrize("tag", SPELLED)
@pytest.mark.parametrize(
    "record",
    [
        {"text": "A TAG b"},
        {"content": "TAG"},
        {"content": [{"type": "text", "text": "TAG"}]},
        {"messages": [{"role": "user", "content": "TAG what?"}, ANSWER]},
        chat(image("cat.jpg"), {"type": "text", "text": "TAG what?"}),
    ],
)
def test_media_that_are_only_spelled_are_refused_unless_allowed(record, tag):
    record = json.loads(json.dumps(record).replace("TAG", tag))
    with pytest.raises(DataError, match=re.escape(f"spells {tag} in its text")):
        check_record(record, Allowed())
    check_record(record, Allowed(spelled_media=True))


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a < image > b, an image, <b>bold</b>, <img src='a.png'>", "id": 5},
        {"content": [image("a.png"), {"type": "text", "text": "word " * 100}]},
        {"content": [image("folder/" * 60 + "a.png"), {"type": "text", "text": "a" * 999}]},
        chat(image("a.png"), {"type": "text", "text": "What is it?"}),
        *[[], "text", None, {"messages": "x"}, {"messages": [5]}, {"content": {"type": "text"}}],
    ],
)
def test_ours_pass_and_so_does_what_the_encoder_refuses(record):
    check_record(record, Allowed())


def test_keys_are_passed_over_by_name():
    record = {"messages": [{**ANSWER, "loss": 0}], "images": ["a.png"], "source": "web"}
    check_record(record, Allowed(keys=frozenset({"loss", "images", "source"})))
    with pytest.raises(DataError, match=r"messages\[0\] has loss besides"):
        check_record(record, Allowed(keys=frozenset({"images", "source"})))


def test_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(gzip.compress(b'{"text": "a"}'))
    with pytest.raises(DataError, match=re.escape(f"{path} is compressed  -> unpack it first")):
        container_of(path)


def test_inputs_are_files(tmp_path):
    with pytest.raises(DataError, match="is no regular file"):
        container_of(tmp_path)

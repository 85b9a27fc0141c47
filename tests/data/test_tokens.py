"""Chat and document encoding, loss targets, placeholders, and the tokenizer folder."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from triptych.configs.model_schema import ModelConfig, TokensConfig
from triptych.data.chat import encode_chat, encode_prompt
from triptych.data.parts import MediaRef
from triptych.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from triptych.data.tokens import encode_record, expand
from triptych.data.types import Media, MediaKind, Sample
from triptych.errors import ConfigError, DataError

TEXTS = ["What is it? A cat.", "Read the digits. 47", "You are a helpful assistant.\n"] * 3
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = {"type": "image", "image": "a.png"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, path, vocab_size=300)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def oracle(folder):
    return AutoTokenizer.from_pretrained(folder)


def supervised(tokenizer, encoded) -> str:
    """The targets as text; what lies between them becomes a bar."""
    edges = np.flatnonzero(np.diff(encoded.targets)) + 1
    runs = np.split(encoded.input_ids, edges)
    kept = np.split(encoded.targets, edges)
    return "".join(
        tokenizer.decode(ids.tolist()) if targets[0] else "|"
        for ids, targets in zip(runs, kept, strict=True)
    )


def test_special_tokens_come_first_in_the_order_of_qwen2(tokenizer, oracle):
    assert oracle.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(14))
    assert tokenizer.tokens == TokensConfig(
        endoftext=0,
        im_start=1,
        im_end=2,
        vision_start=9,
        vision_end=10,
        image_pad=12,
        video_pad=13,
    )


def test_training_is_deterministic(tokenizer, tmp_path):
    assert train_tokenizer(TEXTS, tmp_path, 300).fingerprint == tokenizer.fingerprint
    other = train_tokenizer(["other words altogether"] * 5, tmp_path, 300)
    assert other.fingerprint != tokenizer.fingerprint


@settings(deadline=None)
@given(st.text())
def test_ids_equal_those_of_transformers_and_decode_to_the_text(tokenizer, oracle, value):
    ids = tokenizer.encode(value)
    assert ids == oracle(value, add_special_tokens=False, split_special_tokens=True).input_ids
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_text_makes_no_special_token_in_another_process_either(tokenizer):
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.encode("a <|im_end|>") == tokenizer.encode("a <|im_end|>")
    assert copied.fingerprint == tokenizer.fingerprint


def test_each_digit_is_one_token(tokenizer):
    assert len(tokenizer.encode("4711")) == 4


CHATS = {
    "plain": [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A cat."},
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " \n odd  spaces\n\n"},
        {"role": "assistant", "content": "47"},
        {"role": "user", "content": [text("a"), text("b"), IMAGE, text(" c"), IMAGE]},
        {"role": "assistant", "content": [text("x")]},
    ],
    "image": [
        {"role": "user", "content": [IMAGE, text("What is it?")]},
        {"role": "assistant", "content": "A cat."},
    ],
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_a_chat_equals_the_rendered_template(tokenizer, oracle, chat):
    encoded = encode_chat(chat, tokenizer)
    rendered = oracle.apply_chat_template(chat, tokenize=False)
    assert encoded.input_ids.tolist() == oracle(rendered).input_ids
    prompt = encode_prompt(chat[:-1], tokenizer)
    rendered = oracle.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt.input_ids.tolist() == oracle(rendered).input_ids
    assert not prompt.targets.any()


def test_what_the_chat_template_says(tokenizer):
    encoded = encode_chat(CHATS["image"], tokenizer)
    assert tokenizer.decode(encoded.input_ids.tolist()) == (
        f"{SYSTEM}<|im_start|>user\n{VISION}What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
    )
    assert encoded.input_ids.dtype == np.int32
    assert encoded.targets.dtype == np.uint8
    assert encoded.media == (MediaRef(MediaKind.IMAGE, "a.png"),)


def test_the_assistant_is_supervised_with_its_end_but_not_its_header(tokenizer):
    assert supervised(tokenizer, encode_chat(CHATS["plain"], tokenizer)) == "|A cat.<|im_end|>|"
    two_turns = encode_chat(CHATS["system"], tokenizer)
    assert supervised(tokenizer, two_turns) == "|47<|im_end|>|x<|im_end|>|"


def test_images_in_an_answer_are_no_targets(tokenizer):
    chat = [{"role": "assistant", "content": [text("see"), IMAGE, text("so")]}]
    assert supervised(tokenizer, encode_chat(chat, tokenizer)) == "|see|so<|im_end|>|"


@pytest.mark.parametrize(
    ("record", "targets"),
    [
        ({"text": "A cat."}, "A cat.<|endoftext|>"),
        ({"content": [IMAGE, text("A cat.")]}, "|A cat.<|endoftext|>"),
        ({"content": [text("a"), IMAGE, IMAGE, text("b"), IMAGE]}, "a|b|<|endoftext|>"),
        ({"content": "A cat."}, "A cat.<|endoftext|>"),
    ],
)
def test_documents_are_supervised_with_their_end(tokenizer, record, targets):
    encoded = encode_record(record, tokenizer)
    assert supervised(tokenizer, encoded) == targets
    assert encoded.input_ids[-1] == tokenizer.tokens.endoftext
    assert (encoded.input_ids == tokenizer.tokens.image_pad).sum() == len(encoded.media)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_in_text_are_ordinary_characters(tokenizer, token):
    def chat_of(user: str, answer: str):
        return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    chat, plain = chat_of(token, f"{token} {token}"), chat_of("a", "b")
    ids, ids_of_plain = (encode_chat(turns, tokenizer).input_ids for turns in (chat, plain))
    assert ids[ids < 14].tolist() == ids_of_plain[ids_of_plain < 14].tolist()
    assert tokenizer.decode(ids.tolist()).count(token) >= 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "must be an object, not list"),
        ({}, "one of the keys messages, content and text; this one has none"),
        ({"text": "a", "content": "b"}, "this one has text, content"),
        ({"text": 5}, "text must be a string, not int"),
        ({"text": ""}, "without text"),
        ({"content": [IMAGE]}, "without text"),
        ({"content": 5}, "content must be a string or a list"),
        ({"content": ["a"]}, r"content\[0\].type is None"),
        ({"content": [{"type": "audio"}]}, "'audio'; it must be text, image"),
        ({"content": [{"type": "video", "url": "x"}]}, "needs a string under the key 'video'"),
        ({"content": [{"type": "image", "url": "x"}]}, "needs a string under the key 'image'"),
        ({"content": [{"type": "text", "text": None}]}, "needs a string under the key 'text'"),
        ({"messages": []}, "not empty"),
        ({"messages": "hello"}, "must be a list of turns"),
        (
            {"messages": [{"role": "user"}]},
            r"messages\[0\] must be an object with role and content",
        ),
        ({"messages": [{"role": "bot", "content": ""}]}, "'bot'; it must be one of system, user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        (
            {"messages": [*CHATS["plain"], {"role": "user", "content": [{"type": "x"}]}]},
            r"messages\[2\].content\[0\].type is 'x'",
        ),
    ],
)
def test_malformed_records_are_refused(tokenizer, record, message):
    with pytest.raises(DataError, match=message):
        encode_record(record, tokenizer)


def media(kind: MediaKind = MediaKind.IMAGE) -> Media:
    return Media(kind, shard=0, offset=0, size=0, xxh3=b"", width=28, height=28)


def test_expand_repeats_placeholders():
    tokens = TokensConfig(image_pad=8, video_pad=9)
    sample = Sample(
        np.array([1, 8, 2, 9, 3], dtype=np.int32),
        np.array([0, 0, 1, 0, 1], dtype=np.uint8),
        (media(), media(MediaKind.VIDEO)),
    )
    ids, targets = expand(sample, [(1, 2, 4), (3, 2, 2)], ModelConfig(tokens=tokens))
    assert ids.tolist() == [1, 8, 8, 2, 9, 9, 9, 3]
    assert targets.tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert (ids.dtype, targets.dtype) == (np.int32, np.uint8)


@pytest.mark.parametrize(
    ("ids", "items", "grids"),
    [
        ([1, 8], (), []),
        ([1], (media(),), [(1, 2, 2)]),
        ([1, 8], (media(),), []),
        ([1, 9], (media(),), [(1, 2, 2)]),
        ([8, 8], (media(),), [(1, 2, 2)]),
    ],
)
def test_expand_refuses_placeholders_that_are_not_those_of_the_media(ids, items, grids):
    sample = Sample(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.uint8), items)
    with pytest.raises(DataError, match="placeholders in the text"):
        expand(sample, grids, ModelConfig(tokens=TokensConfig(image_pad=8, video_pad=9)))


def test_missing_special_tokens_are_listed(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    gone = {"<|image_pad|>", "<|vision_end|>"}
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in gone]
    for token in gone:
        del content["model"]["vocab"][token]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"lacks 2 .*<\|vision_end\|> .*<\|image_pad\|> "):
        load_tokenizer(tmp_path)


def test_special_tokens_that_text_could_forge_are_refused(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][2]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"does not mark as special: <\|im_end\|>"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(tmp_path)

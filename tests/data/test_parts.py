"""Places in an image, calls and observations: ids as transformers reads them, and the targets."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from triptych.data.chat import encode_chat, encode_prompt
from triptych.data.tokenizer import SYSTEM_PROMPT, load_tokenizer, train_tokenizer
from triptych.data.tokens import encode_record
from triptych.errors import DataError

IMAGE = {"type": "image", "image": "a.png"}
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
CAT = {"type": "ref", "text": "the cat"}
BOX = {"type": "box", "box": [10, 20, 300, 999]}
BOXED = "<|box_start|>(10,20),(300,999)<|box_end|>"
QUAD = {"type": "quad", "quad": [0, 1, 9, 2, 9, 8, 0, 7]}
LOOK = {"type": "call", "name": "look", "arguments": {"wo": "dürr"}}
TAP = {"type": "call", "name": "tap", "arguments": "```\nx\n```"}
LOOKED = '✿FUNCTION✿: look\n✿ARGS✿: {"wo": "dürr"}'
TAPPED = "✿FUNCTION✿: tap\n✿ARGS✿:\n```\nx\n```"


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def turn(role: str, *content: object) -> dict[str, object]:
    return {"role": role, "content": list(content)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["What is it? The cat.", SYSTEM_PROMPT] * 3, path, vocab_size=300)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def oracle(folder):
    return AutoTokenizer.from_pretrained(folder)


def supervised(tokenizer, encoded) -> list[str]:
    """The runs of targets as text."""
    edges = np.flatnonzero(np.diff(encoded.targets)) + 1
    runs = zip(np.split(encoded.input_ids, edges), np.split(encoded.targets, edges), strict=True)
    return [tokenizer.decode(ids.tolist()) for ids, targets in runs if targets[0]]


REF = f"<|object_ref_start|>the cat<|object_ref_end|>{BOXED}"
DOCUMENTS = {
    "one box": ([IMAGE, CAT, BOX], f"{VISION}{REF}"),
    "several": ([IMAGE, text("See "), CAT, BOX, BOX, text(".")], f"{VISION}See {REF}{BOXED}."),
    "quad": ([QUAD], "<|quad_start|>(0,1),(9,2),(9,8),(0,7)<|quad_end|>"),
}


@pytest.mark.parametrize(("content", "rendered"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_places_are_the_ids_of_their_special_tokens(tokenizer, oracle, content, rendered):
    encoded = encode_record({"content": content}, tokenizer)
    assert encoded.input_ids.tolist() == oracle(f"{rendered}<|endoftext|>").input_ids
    said = rendered.removeprefix(VISION) + "<|endoftext|>"
    assert supervised(tokenizer, encoded) == [said]


def test_places_asked_for_are_no_targets_and_places_answered_are(tokenizer, oracle):
    chat = [turn("user", IMAGE, text("Where is "), CAT, text("?")), turn("assistant", CAT, BOX)]
    encoded = encode_chat(chat, tokenizer)
    rendered = (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{VISION}Where is "
        "<|object_ref_start|>the cat<|object_ref_end|>?<|im_end|>\n"
        f"<|im_start|>assistant\n{REF}<|im_end|>\n"
    )
    assert encoded.input_ids.tolist() == oracle(rendered).input_ids
    assert supervised(tokenizer, encoded) == [f"{REF}<|im_end|>"]


ASK = turn("user", text("Go."))
TURN = "<|im_start|>assistant\n"
AGENTS = {
    "call and answer": (
        [turn("assistant", LOOK), turn("tool", text("a cat")), turn("assistant", text("A cat."))],
        f"{TURN}{LOOKED}\n✿RESULT✿: a cat\n✿RETURN✿: A cat.<|im_end|>\n",
        [f"{LOOKED}\n✿RESULT✿", ": A cat.<|im_end|>"],
    ),
    "thought, then two calls at once": (
        [
            turn("assistant", text("Hm."), LOOK, TAP),
            turn("tool", text("a")),
            turn("tool", IMAGE),
            turn("assistant", text("b")),
        ],
        f"{TURN}Hm.\n{LOOKED}\n{TAPPED}\n✿RESULT✿: a\n✿RESULT✿: {VISION}\n✿RETURN✿: b<|im_end|>\n",
        [f"Hm.\n{LOOKED}\n{TAPPED}\n✿RESULT✿", ": b<|im_end|>"],
    ),
    "call after call": (
        [turn("assistant", LOOK), turn("tool", text("a")), turn("assistant", TAP)],
        f"{TURN}{LOOKED}\n✿RESULT✿: a\n✿RETURN✿: \n{TAPPED}<|im_end|>\n",
        [f"{LOOKED}\n✿RESULT✿", f": \n{TAPPED}<|im_end|>"],
    ),
    "what follows is seen in the next turn of the user": (
        [turn("assistant", LOOK), turn("user", IMAGE), turn("assistant", text("b"))],
        f"{TURN}{LOOKED}<|im_end|>\n<|im_start|>user\n{VISION}<|im_end|>\n{TURN}b<|im_end|>\n",
        [f"{LOOKED}<|im_end|>", "b<|im_end|>"],
    ),
}


@pytest.mark.parametrize(("turns", "rendered", "targets"), AGENTS.values(), ids=AGENTS)
def test_calls_are_targets_and_observations_are_not(tokenizer, oracle, turns, rendered, targets):
    chat = [turn("system", text("s")), ASK, *turns]
    encoded = encode_chat(chat, tokenizer)
    before = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nGo.<|im_end|>\n"
    assert encoded.input_ids.tolist() == oracle(before + rendered).input_ids
    assert supervised(tokenizer, encoded) == targets


def test_a_prompt_goes_on_in_the_turn_of_the_call(tokenizer):
    prompt = encode_prompt([ASK, turn("assistant", LOOK), turn("tool", text("a"))], tokenizer)
    assert tokenizer.decode(prompt.input_ids.tolist()).endswith(f"{LOOKED}\n✿RESULT✿: a\n✿RETURN✿")


def test_the_line_end_after_an_answer_is_a_target_where_asked_for(tokenizer):
    chat = {"messages": [ASK, turn("assistant", text("a")), ASK, turn("assistant", text("b"))]}
    encoded = encode_record(chat, tokenizer, line_end_is_target=True)
    assert supervised(tokenizer, encoded) == ["a<|im_end|>\n", "b<|im_end|>\n"]
    plain = encode_record(chat, tokenizer)
    assert encoded.input_ids.tolist() == plain.input_ids.tolist()


def test_a_clip_is_in_milliseconds(tokenizer):
    shown = [{"video_start": 0.5, "video_end": 1.25}, {"video_start": 2}, {"video_end": 3}, {}]
    encoded = encode_record({"content": [*({**FILM, **s} for s in shown), text("a")]}, tokenizer)
    clips = [item.clip for item in encoded.media]
    assert clips == [(500, 1250), (2000, None), (0, 3000), None]


FILM = {"type": "video", "video": "film.mp4"}
BAD = {
    "observation first": ([ASK, turn("tool", text("a"))], r"messages\[1\] is what a tool says"),
    "one too many": (
        [ASK, turn("assistant", LOOK), turn("tool"), turn("tool")],
        r"messages\[3\] is what a tool says, but 1 calls stand before it and 1 are answered",
    ),
    "one too few": (
        [ASK, turn("assistant", LOOK, TAP), turn("tool"), turn("assistant", text("a"))],
        r"messages\[2\]: 1 of 2 calls are answered",
    ),
    "user goes on": (
        [ASK, turn("assistant", LOOK), turn("tool"), ASK],
        r"messages\[3\] is of user, but after what a tool says the assistant goes on",
    ),
    "observation last": ([ASK, turn("assistant", LOOK), turn("tool")], "end with what a tool"),
    "call of a user": ([turn("user", LOOK)], r"content\[0\] is a call, which only"),
    "call without name": ([turn("assistant", {"type": "call", "arguments": {}})], "needs a name"),
    "beyond": ([turn("user", {**BOX, "box": [0, 0, 1000, 5]})], r"lie in \[0, 1000\)  -> scale"),
    "corners": ([turn("user", {**BOX, "box": [9, 0, 1, 5]})], "the upper left one"),
    "fraction": ([turn("user", {**BOX, "box": [0, 0, 0.5, 1]})], "needs 4 whole numbers"),
    "three": ([turn("user", {**QUAD, "quad": [0, 0, 1]})], "needs 8 whole numbers under 'quad'"),
    "backwards": (
        [turn("user", {**FILM, "video_start": 3, "video_end": 2.5})],
        r"content\[0\]: video_start=3 must be before video_end=2.5",
    ),
    "endless": ([turn("user", {**FILM, "video_start": 1e6})], "must be seconds from 0 to 16200"),
    "spelled": ([turn("user", {**FILM, "video_end": "2"})], "video_end are 0 and '2'; they must"),
    "ref": ([turn("user", {"type": "ref"})], "of type ref needs a string under the key 'text'"),
}


@pytest.mark.parametrize(("turns", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused(tokenizer, turns, message):
    with pytest.raises(DataError, match=message):
        encode_chat(turns, tokenizer)


def test_a_tokenizer_without_the_special_tokens_says_so(tokenizer):
    with pytest.raises(DataError, match=r"lacks <\|circle_start\|>"):
        tokenizer.special("circle_start")

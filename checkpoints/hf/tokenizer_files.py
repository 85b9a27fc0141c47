"""The tokenizer of an exported folder: the run's own, with the settings that harnesses rely on.

What matters is read from these files by every tool: where an answer ends, how prompts are padded,
and the text around a picture. A template that renders another text than training had is replaced.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from triptych.data.tokenizer import CHAT_TEMPLATE
from triptych.errors import CheckpointError

COPIED = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
SETTINGS, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, LEGACY_TEMPLATE = "chat_template.jinja", "chat_template.json"
"""Where processors of transformers look, those of 5 and those of early 4."""
MODEL_INPUTS = ["input_ids", "attention_mask"]
"""What a tokenizer gives a model. ``AutoTokenizer`` of transformers 4 has ``token_type_ids`` beside
them where the class is not Qwen2's, and its Qwen2-VL fails on those."""
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"

_IMAGE, _VIDEO = {"type": "image"}, {"type": "video"}
_QUESTION = {"type": "text", "text": "What is it?"}
CHATS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "text": [{"role": "user", "content": "What is it?"}],
    "an image": [{"role": "user", "content": [_IMAGE, _QUESTION]}],
    "a video": [{"role": "user", "content": [_VIDEO, _QUESTION]}],
    "turns after a system prompt": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [_QUESTION, _IMAGE]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And this?"},
    ],
}
"""What a template must render as the training text had it."""


def write_tokenizer(source: Path, folder: Path, *, is_base: bool, max_length: int) -> str:
    """Write the tokenizer files of an export.

    Args:
        source: a tokenizer folder.
        folder: the export.
        is_base: an answer ends with ``<|endoftext|>``, not with ``<|im_end|>``.
        max_length: tokens that the model was made for.

    Returns:
        What is other than in ``source`` and worth telling; empty where nothing is.

    Raises:
        CheckpointError: there is no tokenizer_config.json.
    """
    if not (source / SETTINGS).exists():
        raise CheckpointError(f"{source} holds no {SETTINGS}")
    for name in COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    ends = ends_of(is_base=is_base)
    settings = json.loads((source / SETTINGS).read_text())
    template = template_of(source)
    wrong = [what for what in CHATS if rendered(template, what) != rendered(CHAT_TEMPLATE, what)]
    if template is None or wrong:
        template = CHAT_TEMPLATE
    settings |= ends | {
        "padding_side": "left",
        "model_max_length": max_length,
        "chat_template": template,
        "model_input_names": MODEL_INPUTS,
    }
    _write_json(folder / SETTINGS, settings)
    if (source / SPECIAL_TOKENS).exists():
        special = json.loads((source / SPECIAL_TOKENS).read_text())
        _write_json(folder / SPECIAL_TOKENS, special | ends)
    (folder / TEMPLATE).write_text(template)
    _write_json(folder / LEGACY_TEMPLATE, {"chat_template": template})
    if not wrong:
        return ""
    return (
        f"the chat template of {source} renders {', '.join(wrong)} otherwise than training did: "
        "the export has ours"
    )


def ends_of(*, is_base: bool) -> dict[str, str]:
    """Where an answer ends, and what fills a batch."""
    return {"eos_token": END_OF_TEXT if is_base else END_OF_TURN, "pad_token": END_OF_TEXT}


def template_of(folder: Path) -> str | None:
    """The chat template of a folder, of the places where it may be the one that counts."""
    if (folder / TEMPLATE).exists():
        return (folder / TEMPLATE).read_text()
    for name in (LEGACY_TEMPLATE, SETTINGS):
        if (folder / name).exists():
            template = json.loads((folder / name).read_text()).get("chat_template")
            if isinstance(template, str):
                return template
    return None


def rendered(template: str | None, what: str) -> str | None:
    """One of ``CHATS``, up to where the answer begins; None where the template cannot.

    Rendered in a sandbox, as transformers does.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        compiled = environment.from_string(template or "")
        return compiled.render(messages=CHATS[what], add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None  # as one for text alone, which joins a list of parts to a string


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

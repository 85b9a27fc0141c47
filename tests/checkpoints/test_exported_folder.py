"""What lies beside exported weights: every tool that reads it does as training did."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from triptych.checkpoints.hf.cards import evaluation_card, model_card
from triptych.checkpoints.hf.model_config import video_preprocessor_config
from triptych.checkpoints.hf.origin import LICENCE_UNKNOWN, Origin, licence_of
from triptych.checkpoints.hf.tokenizer_files import CHATS, rendered, template_of, write_tokenizer
from triptych.configs.model_schema import ModelConfig
from triptych.data.chat import encode_prompt
from triptych.data.tokenizer import CHAT_TEMPLATE, load_tokenizer, train_tokenizer
from triptych.data.types import PixelLimits
from triptych.errors import CheckpointError

TEXT_ONLY = (  # of Qwen2's text models
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OF_THE_HUB = (  # of Qwen2-VL
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    train_tokenizer(["read the digits"], tmp_path / "tokenizer", 280)
    special = {"eos_token": "<|im_end|>", "pad_token": None, "bos_token": "x"}
    (tmp_path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(special))
    return tmp_path / "tokenizer"


def write(source: Path, *, is_base: bool = False) -> tuple[Path, str]:
    folder = source.parent / f"base {is_base}"
    folder.mkdir()
    return folder, write_tokenizer(source, folder, is_base=is_base, max_length=4096)


def with_template(folder: Path, template: object) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps(content))


def with_files(content):
    if isinstance(content, str):
        return content
    return [{**part, part["type"]: part.get("text", "x.png")} for part in content]


@pytest.mark.parametrize(("is_base", "end"), [(True, "<|endoftext|>"), (False, "<|im_end|>")])
def test_the_tokenizer_ends_pads_and_cuts_as_the_model_needs(is_base, end, tokenizer):
    folder, told = write(tokenizer, is_base=is_base)
    assert told == ""
    loaded = AutoTokenizer.from_pretrained(folder)
    assert (loaded.eos_token, loaded.pad_token) == (end, "<|endoftext|>")
    assert (loaded.padding_side, loaded.model_max_length) == ("left", 4096)
    assert loaded.model_input_names == ["input_ids", "attention_mask"]
    special = json.loads((folder / "special_tokens_map.json").read_text())
    assert special == {"eos_token": end, "pad_token": "<|endoftext|>", "bos_token": "x"}
    assert load_tokenizer(folder).tokens == load_tokenizer(tokenizer).tokens


def test_our_template_renders_what_training_had(tokenizer):
    """By the code that encodes training samples."""
    encoder = load_tokenizer(tokenizer)
    for name, messages in CHATS.items():
        if name == "a video":
            continue  # not encoded yet
        named = [{**turn, "content": with_files(turn["content"])} for turn in messages]
        want = encoder.decode(encode_prompt(named, encoder).input_ids.tolist())
        assert rendered(CHAT_TEMPLATE, name) == want


def test_the_template_of_qwen2_vl_is_kept(tokenizer):
    with_template(tokenizer, OF_THE_HUB)
    folder, told = write(tokenizer)
    assert told == ""
    assert template_of(folder) == OF_THE_HUB
    for name in ("chat_template.json", "tokenizer_config.json"):
        assert json.loads((folder / name).read_text())["chat_template"] == OF_THE_HUB


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        (TEXT_ONLY, "an image, a video, turns after a system prompt"),
        (OF_THE_HUB.replace("video_pad", "image_pad"), "a video"),
        (OF_THE_HUB.replace("helpful", "useful"), "text, an image, a video"),
        ("{{ nonsense", "text, an image, a video, turns after a system prompt"),
        (None, "text, an image, a video, turns after a system prompt"),
    ],
)
def test_another_template_is_replaced_and_told(template, wrong, tokenizer):
    with_template(tokenizer, template)
    folder, told = write(tokenizer)
    assert told == (
        f"the chat template of {tokenizer} renders {wrong} otherwise than training did: "
        "the export has ours"
    )
    assert template_of(folder) == CHAT_TEMPLATE
    loaded = AutoTokenizer.from_pretrained(folder)
    chat = loaded.apply_chat_template(CHATS["an image"], tokenize=False, add_generation_prompt=True)
    assert chat == rendered(CHAT_TEMPLATE, "an image")


def test_a_tokenizer_without_settings_is_refused(tmp_path, tokenizer):
    (tokenizer / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer_config\.json"):
        write(tokenizer)


def test_videos_do_not_get_the_limits_of_images():
    """As transformers' own class reads them."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = video_preprocessor_config(ModelConfig(), LIMITS.video)
    assert config["size"] == {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
    assert (config["do_sample_frames"], config["fps"]) == (True, 2.0)
    assert int(config["max_video_tokens"] * 0.9) == 16384
    assert Qwen2VLImageProcessorPil(**config).size["longest_edge"] == 768 * 28 * 28


# --- the cards

LIMITS = PixelLimits(min_pixels=784, max_pixels=28224)
STAGE_2 = Origin(
    limits=LIMITS,
    stage="stage2",
    run="runs/two",
    step=1200,
    consumed_tokens=34567,
    plan="abc",
    parents=("Qwen2-7B as init.language (licence apache-2.0)",),
)


def test_the_card_says_where_the_model_comes_from():
    card = model_card("mine", ModelConfig(name="debug"), STAGE_2)
    for told in (
        "# mine\n",
        "**base model**",
        "| run | `runs/two` |",
        "| stage | stage2 |",
        "| step | 1,200 |",
        "| tokens of this stage | 34,567 |",
        "| data plan | `abc` |",
        "- Qwen2-7B as init.language (licence apache-2.0)",
    ):
        assert told in card
    imported = model_card("mine", ModelConfig(name="x"), Origin(limits=LIMITS, stage="imported"))
    assert "base model" not in imported
    assert "none: imported, not trained here" in imported


def test_each_harness_gets_the_trained_limits():
    card = evaluation_card(Path("out/mine"), STAGE_2)
    assert "pretrained=mine,min_pixels=784,max_pixels=28224" in card
    assert "min_pixels=784, max_pixels=28224" in card
    assert "SGLANG_IMAGE_MAX_PIXELS=28224 python -m sglang" in card
    assert "of which training took 2 frames a second" in card
    assert "lmms-eval at most `max_num_frames` (32) of them" in card
    assert "**base model**" in card
    assert "Rename" not in card
    assert "its name has `2.5`" in evaluation_card(Path("out/qwen-2.5-mine"), STAGE_2)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "licence apache-2.0"),
        ("---\nlicense: other\nlicense_name: x\n---", "licence other"),
        ("# A model\n", LICENCE_UNKNOWN),
        (None, LICENCE_UNKNOWN),
    ],
)
def test_a_licence_is_what_the_folder_states(text, licence, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence

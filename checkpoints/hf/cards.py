"""Two pages of an exported folder: what the model is, and how it is scored as it was trained."""

from pathlib import Path

from triptych.checkpoints.hf.origin import Origin
from triptych.configs.model_schema import ModelConfig
from triptych.data.tokenizer import SYSTEM_PROMPT

BASE = (
    "This is a **base model**: it has not been trained on instructions. It continues text, and a "
    "text ends with `<|endoftext|>`. Benchmarks that chat with it measure little."
)
CHAT = "A chat model: ChatML, an answer ends with `<|im_end|>`."


def model_card(name: str, model: ModelConfig, origin: Origin) -> str:
    """The ``README.md``: run, step, tokens, plan, parents and their licences."""
    rows = {
        "sizes": f"`{model.name}`, those of `config.json`",
        "run": f"`{origin.run}`" if origin.run else "none: imported, not trained here",
        "stage": origin.stage,
        "step": f"{origin.step:,}",
        "tokens of this stage": f"{origin.consumed_tokens:,}",
        "data plan": f"`{origin.plan}`" if origin.plan else "none",
        "image limits, pixels": f"{origin.limits.min_pixels:,} to {origin.limits.max_pixels:,}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    parents = "\n".join(f"- {parent}" for parent in origin.parents) or "- none: random weights"
    return f"""# {name}

{BASE if origin.is_base else CHAT}

Exported by Triptych, in the format of Qwen2-VL. [EVALUATE.md](EVALUATE.md) says how to score it.

| | |
|---|---|
{table}

Started from, with what those started from:

{parents}

The licences of all of these, and of the data, bind whoever uses this folder.
"""


def evaluation_card(folder: Path, origin: Origin) -> str:
    """The ``EVALUATE.md``: commands that score the model at the resolution that it was trained at.

    Source: lmms-eval models/simple/qwen2_vl.py; VLMEvalKit vlmeval/vlm/qwen2_vl/model.py; vLLM
    multimodal/video.py; SGLang srt/multimodal/processors/qwen_vl.py.
    """
    name, limits, video = folder.name, origin.limits, origin.limits.video
    least, most = limits.min_pixels, limits.max_pixels
    pixels = f"min_pixels={least},max_pixels={most}"
    warned = (
        f"\n{BASE} What follows fits the chat model that it may become.\n" if origin.is_base else ""
    )
    clash = next((x for x in ("omni", "2.5", "2_5", "qwen25") if x in name.lower()), None)
    renamed = f" **Rename this folder first: its name has `{clash}`.**" if clash else ""
    return f"""# How to score {name}

Trained on images of {least:,} to {most:,} pixels, with the system prompt
`{SYSTEM_PROMPT}`. Harnesses have limits of their own, and use them without a word: give these.
{warned}
Run what follows in the folder that this one lies in.

## lmms-eval

Its own limits are 3,136 to 602,112 pixels; what is given is for pictures and frames of videos. It
sends pictures through JPEG of quality 85, which training did not. Of a video qwen-vl-utils takes
frames from the first to the last, and lmms-eval at most `max_num_frames` (32) of them; training
took frames `i * total // n`, as transformers does.

    python -m lmms_eval --model qwen2_vl --model_args pretrained={name},{pixels} \\
        --tasks mmmu_val --batch_size 1 --log_samples --output_path results

## VLMEvalKit

It has no system prompt of its own: the chat template then puts the trained one. It tells families
by the path: one with `2.5`, `2_5`, `qwen25` or `omni` in it is opened as another model.{renamed}
Add to `vlmeval/config.py`:

    "{name}": partial(
        Qwen2VLChat, model_path="{name}", min_pixels={least}, max_pixels={most},
        use_custom_prompt=False,
    )

and run

    python run.py --data MMMU_DEV_VAL --model {name} --verbose

## vLLM and SGLang

Both read weights, template, the end of an answer and the limits of pictures from this folder, but
not those of videos, of which training took {video.fps:g} frames a second.

    vllm serve {name} --limit-mm-per-prompt '{{"image": 4}}'
    SGLANG_IMAGE_MAX_PIXELS={most} python -m sglang.launch_server --model-path {name}

vLLM takes 32 frames of a video, however long it is; another number is set by
`--media-io-kwargs '{{"video": {{"num_frames": 64}}}}'`. SGLang first resizes pictures to
at least 3,136 pixels and at most `SGLANG_IMAGE_MAX_PIXELS`, then by the limits of this folder:
pictures of fewer than 3,136 pixels it may show larger than training did. Of a video it takes 2
frames a second, each of 100,352 to 602,112 pixels, whatever this folder says.

## transformers

    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration
    model = Qwen2VLForConditionalGeneration.from_pretrained("{name}")
    processor = AutoProcessor.from_pretrained("{name}")    # needs torchvision

With torchvision, pictures are resized by its kernel; training used Pillow's. They differ by 1 of
255 in a part of the values, on noise by up to 6.
"""

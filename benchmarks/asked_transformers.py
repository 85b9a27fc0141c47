"""Answers of the transformers of whichever environment runs this; other_environment.py calls it.

    python benchmarks/asked_transformers.py EXPORTED QUESTIONS ANSWERS

Of this project it imports nothing: only torch, transformers, numpy and Pillow need be there.
QUESTIONS holds questions.json and the files that it names. ANSWERS, a new folder, gets a file for
each backend of images that is there: by Pillow, and where torchvision is, by torchvision, which
also takes videos by transformers' own processor, where ``AutoProcessor`` has one.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageSequence
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
)
from transformers.utils import is_torchvision_available

MAX_NEW_TOKENS = 8


def main(exported: Path, folder: Path, answers: Path) -> None:
    """Answer all questions by each backend; write answers, and the pixels that were made."""
    answers.mkdir()
    told = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "opened_by_its_name": opened_by_its_name(exported),
    }
    model = Qwen2VLForConditionalGeneration.from_pretrained(exported).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for is_fast in [False, True] if is_torchvision_available() else [False]:
        images = AutoImageProcessor.from_pretrained(exported, use_fast=is_fast)
        videos = None
        if is_fast:
            videos = getattr(AutoProcessor.from_pretrained(exported), "video_processor", None)
        found, pixels = [], {}
        for number, question in enumerate(json.loads((folder / "questions.json").read_text())):
            media = media_of(question, folder, images, videos)
            made = media.get("pixel_values") if question["kind"] == "image" else None
            if question["kind"] == "video" and videos is not None:
                made = media["pixel_values_videos"]
            if made is not None:
                pixels[str(number)] = made.numpy()
            prompt = prompt_of(question, media, tokenizer, images.merge_size, model)
            found.append(answer(model, tokenizer, prompt))
        name = "torchvision" if is_fast else "pillow"
        processors = [type(each).__name__ for each in (images, videos) if each is not None]
        written = {**told, "processors": processors, "answers": found}
        np.savez(answers / f"{name}.npz", **pixels)
        (answers / f"{name}.json").write_text(json.dumps(written))


def opened_by_its_name(exported: Path) -> str:
    """The class that ``AutoProcessor`` opens the folder as, or what it says instead."""
    try:
        return type(AutoProcessor.from_pretrained(exported)).__name__
    except (ImportError, OSError, ValueError) as error:
        return str(error).strip().splitlines()[0]


def media_of(question: Any, folder: Path, images: Any, videos: Any) -> dict[str, Any]:
    """What a processor makes of the file; of a video, what training had, where there is none."""
    file = folder / question["file"]
    if question["kind"] == "image":
        return dict(images(images=[Image.open(file)], return_tensors="pt"))
    if question["kind"] == "text":
        return {}
    if videos is None:
        saved = np.load(file.with_suffix(".npz"))
        return {
            "pixel_values_videos": torch.from_numpy(saved["patches"]),
            "video_grid_thw": torch.from_numpy(saved["grid_thw"]),
        }
    with Image.open(file) as film:
        duration_s = film.info["duration"] / 1000 * film.n_frames
        frames = np.stack(
            [np.asarray(each.convert("RGB")) for each in ImageSequence.Iterator(film)]
        )
    about = {
        "fps": len(frames) / duration_s,
        "total_num_frames": len(frames),
        "duration": duration_s,
    }
    made = videos(
        videos=[frames], video_metadata=[about], do_sample_frames=True, return_tensors="pt"
    )
    return {name: made[name] for name in ("pixel_values_videos", "video_grid_thw")}


def prompt_of(
    question: Any, media: dict[str, Any], tokenizer: Any, merge_size: int, model: Any
) -> dict[str, Any]:
    """By the folder's template, with as many tokens as the media have."""
    kind = question["kind"]
    shown = [] if kind == "text" else [{"type": kind}]
    content = [*shown, {"type": "text", "text": question["prompt"]}]
    messages = [{"role": "user", "content": content}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pad = f"<|{kind}_pad|>"
    if kind != "text":
        chat = chat.replace(pad, pad * (int(media[f"{kind}_grid_thw"].prod()) // merge_size**2))
    prompt = {**tokenizer([chat], return_tensors="pt"), **media}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        ids = prompt["input_ids"]
        image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        prompt["mm_token_type_ids"] = (ids == image).int() + 2 * (ids == video).int()
    return prompt


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """Greedy; plain JSON."""
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return {
        "input_ids": prompt["input_ids"][0].tolist(),
        "answer": tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :].tolist()),
        "logits": model(**prompt).logits[0, -1].tolist(),
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))

"""Answers of the transformers of whichever environment runs this; other_environment.py calls it.

    python benchmarks/asked_transformers.py EXPORTED QUESTIONS

Of this project it imports nothing: only torch, transformers, numpy and Pillow need be there.
QUESTIONS holds questions.json and the files that it names; answers are written beside it.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

MAX_NEW_TOKENS = 8


def main(exported: Path, folder: Path) -> None:
    """Answer all questions, and write ``answers_VERSION.json`` and the pixels of the images."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(exported).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    processor = AutoImageProcessor.from_pretrained(exported)
    answers, pixels = [], {}
    for number, question in enumerate(json.loads((folder / "questions.json").read_text())):
        prompt = prompt_of(question, folder, tokenizer, processor, model)
        if question["kind"] == "image":
            pixels[str(number)] = prompt["pixel_values"].numpy()
        with torch.no_grad():
            logits = model(**prompt).logits[0, -1]
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        answers.append(
            {
                "input_ids": prompt["input_ids"][0].tolist(),
                "answer": tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :].tolist()),
                "logits": logits.tolist(),
            }
        )
    version = transformers.__version__
    told = {"transformers": version, "torch": torch.__version__, "images": type(processor).__name__}
    np.savez(folder / f"pixels_{version}.npz", **pixels)
    (folder / f"answers_{version}.json").write_text(json.dumps({**told, "answers": answers}))
    print(version)


def prompt_of(question: Any, folder: Path, tokenizer: Any, processor: Any, model: Any) -> Any:
    """By the folder's template and image processor; of a video, with the patches in the file."""
    kind, shown, media = question["kind"], [], {}
    if kind == "image":
        media = dict(processor(images=[Image.open(folder / question["file"])], return_tensors="pt"))
    elif kind == "video":
        saved = np.load(folder / question["file"])
        media["pixel_values_videos"] = torch.from_numpy(saved["patches"])
        media["video_grid_thw"] = torch.from_numpy(saved["grid_thw"])
    if kind != "text":
        shown = [{"type": kind}]
    content = [*shown, {"type": "text", "text": question["prompt"]}]
    messages = [{"role": "user", "content": content}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pad = f"<|{kind}_pad|>"
    if kind != "text":
        merge = processor.merge_size**2
        chat = chat.replace(pad, pad * (int(media[f"{kind}_grid_thw"].prod()) // merge))
    prompt = {**tokenizer([chat], return_tensors="pt"), **media}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        ids = prompt["input_ids"]
        image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        prompt["mm_token_type_ids"] = (ids == image).int() + 2 * (ids == video).int()
    return prompt


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

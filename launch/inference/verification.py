"""An export against its checkpoint: tensors, settings, then one answer each of two programs.

The answers are greedy and in fp32 on both sides, of the weights as they were exported: transformers
by the folder's own processor, template and ``generate``, ours by the forward pass of training.
transformers' processor of videos needs torchvision, so of a video it is given training's patches.
Pictures are asked by each backend of images that is there, Pillow and torchvision.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops
from torch import Tensor

from triptych.checkpoints.hf.export_problems import file_problems, weight_problems
from triptych.checkpoints.locate import locate
from triptych.configs.schema import Precision
from triptych.data.loading.collate import Segment, collate
from triptych.data.media.image import decode_image
from triptych.data.media.normalize import normalize_patches
from triptych.data.types import MediaKind
from triptych.errors import CheckpointError
from triptych.launch.inference.answering import TIMEOUT_S, Answerer, Question
from triptych.models.generate import next_logits
from triptych.parallel.agree import SingleProcess
from triptych.parallel.mesh import build_mesh, init_distributed

PROMPT = "What is this?"
MAX_NEW_TOKENS = 8
PILLOW = "Pillow"
"""The backend of images whose pixels are training's; torchvision's are not."""
VIDEO_FRAMES = 4
VIDEO_FRAME_MS = 500
LOGITS_BAR = 1e-3
"""Largest difference / largest logit, in fp32; between right models it is rounding: 1.2e-6 on the
models of the tests, 1.8e-4 with all weights drawn from N(0, 1), where transformers itself is 1.3e-4
from its own fp64, and ours 5.1e-5."""


@dataclass(slots=True)
class Report:
    """What was compared, and what is wrong."""

    told: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(exported: Path, checkpoint: Path, *, answers: bool = True) -> list[str]:
    """Compare; returns what was found equal, for people.

    Args:
        exported: what ``launch/convert.py export`` wrote.
        checkpoint: what it was made of.
        answers: also load both models, and let them answer.

    Raises:
        CheckpointError: lists all that differs.
    """
    folder = locate(checkpoint, SingleProcess())
    init_distributed(TIMEOUT_S)
    mesh = build_mesh(1, 1, seed=0, timeout_s=TIMEOUT_S)
    problems = [*weight_problems(exported, folder, mesh), *file_problems(exported, folder)]
    told = ["every tensor: bit-equal", "every setting, and the chat template: as trained"]
    if answers and not problems:
        report = Report()
        _compare_answers(exported, folder, report)
        told, problems = told + report.told, report.problems
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"{exported} is not what {folder} says:\n  {listed}\n  -> export it again, or name the "
            "checkpoint that it is of"
        )
    return told


def _compare_answers(exported: Path, folder: Path, report: Report) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    ours = Answerer.load(folder, exported, Precision.fp32)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(exported)
    exported_dtype = theirs.dtype
    theirs = theirs.float().eval()
    [model] = ours.chunks
    for parameter in model.parameters():
        parameter.data = parameter.data.to(exported_dtype).float()
    processors = _processors(exported)
    for question in _questions():
        is_image = question.file is not None and question.kind == MediaKind.IMAGE
        for backend, processor in processors if is_image else processors[:1]:
            where = f"{question.where} by {backend}" if is_image else question.where
            _compare_question(ours, theirs, processor, question, where, report)


def _processors(exported: Path) -> list[tuple[str, Any]]:
    """One for each backend of images that is installed."""
    from transformers import AutoImageProcessor
    from transformers.utils import is_torchvision_available

    from triptych.checkpoints.hf.processor import load_processor

    by_pillow = load_processor(exported)
    if not is_torchvision_available():
        return [(PILLOW, by_pillow)]
    by_pillow.image_processor = AutoImageProcessor.from_pretrained(exported, backend="pil")
    return [(PILLOW, by_pillow), ("torchvision", load_processor(exported))]


def _compare_question(
    ours: Answerer, theirs: Any, processor: Any, question: Question, where: str, report: Report
) -> None:
    """What follows from other pixels than training's is told, and no fault of the export."""
    mine, faults = ours.prompt(question), report.problems
    if question.kind == MediaKind.VIDEO:
        prompt = _prompt_with_our_frames(processor, question, mine)
        report.told.append(f"{where}: frames and pixels are training's, and not compared")
    else:
        prompt = _prompt_of_transformers(processor, question)
    if prompt["input_ids"][0].tolist() != mine.input_ids.tolist():
        report.problems.append(f"{where}: the processor makes other ids than training")
        return
    if "pixel_values" in prompt:
        trained = normalize_patches(torch.from_numpy(mine.pixels[0]))
        apart = float((prompt["pixel_values"] - trained).abs().max())
        report.told.append(f"{where}: pixels at most {apart:.2g} from training's")
        if apart > 0 and where.endswith(PILLOW):
            report.problems.append(report.told[-1])
        elif apart > 0:
            faults = report.told
    [model] = ours.chunks
    batch = collate([mine], ours.config, pad_to=1, with_pixels=True)
    apart = _logits_apart(theirs, prompt, next_logits(model, batch)[0])
    report.told.append(f"{where}: logits {apart:.1e} of the largest from ours")
    if not apart <= LOGITS_BAR:
        faults.append(f"{report.told[-1]}, more than {LOGITS_BAR:g}")
    [answer] = ours.answer([question], max_new_tokens=MAX_NEW_TOKENS)
    other = _answer_of_transformers(theirs, prompt)
    text = ours.tokenizer.decode(answer)
    if answer == other:
        report.told.append(f"{where}: both answer {text!r} ({len(answer)} tokens)")
    else:
        other_text = ours.tokenizer.decode(other)
        faults.append(f"{where}: transformers answers {other_text!r}, we {text!r}")


@torch.no_grad()
def _logits_apart(theirs: Any, prompt: Any, ours: Tensor) -> float:
    """Of the next token: largest difference / largest logit."""
    found = theirs(**prompt).logits[0, -1]
    return float((found - ours).abs().max() / ours.abs().max())


def _questions() -> Iterator[Question]:
    picture = Image.radial_gradient("L").resize((180, 130))
    image, video = io.BytesIO(), io.BytesIO()
    picture.convert("RGB").save(image, "PNG")
    frames = [ImageChops.offset(picture, 20 * number, 0) for number in range(VIDEO_FRAMES)]
    frames[0].save(video, "GIF", save_all=True, append_images=frames[1:], duration=VIDEO_FRAME_MS)
    yield Question(image.getvalue(), PROMPT, "an image")
    yield Question(video.getvalue(), PROMPT, "a video", MediaKind.VIDEO)
    yield Question(None, PROMPT, "text alone")


def _prompt_of_transformers(processor: Any, question: Question) -> Any:
    file, where = question.file, question.where
    images = None if file is None else [decode_image(file, where).convert("RGB")]
    return processor(text=[_chat(processor, question)], images=images, return_tensors="pt")


def _prompt_with_our_frames(processor: Any, question: Question, mine: Segment) -> Any:
    """By its template and tokenizer, with the patches of training."""
    num_merged = int(mine.grid_thw.prod()) // processor.image_processor.merge_size**2
    pad = processor.video_token
    chat = _chat(processor, question).replace(pad, pad * num_merged)
    prompt = processor.tokenizer([chat], return_tensors="pt")
    prompt["mm_token_type_ids"] = 2 * (prompt["input_ids"] == processor.video_token_id).int()
    prompt["pixel_values_videos"] = normalize_patches(torch.from_numpy(mine.pixels[0]))
    prompt["video_grid_thw"] = torch.from_numpy(mine.grid_thw)
    return prompt


def _chat(processor: Any, question: Question) -> str:
    chat: str = processor.apply_chat_template(question.messages(), add_generation_prompt=True)
    return chat


@torch.no_grad()
def _answer_of_transformers(model: Any, prompt: Any) -> list[int]:
    """Ids of the answer, without the token that ends it."""
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    new: list[int] = ids[0, prompt["input_ids"].shape[1] :].tolist()
    ends = [i for i, token in enumerate(new) if token in model.generation_config.eos_token_id]
    return new[: ends[0]] if ends else new

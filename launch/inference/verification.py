"""An export against its checkpoint: tensors, settings, then one answer each of two programs.

The answers are greedy and in fp32 on both sides, of the weights as they were exported: transformers
by the folder's own processor, template and ``generate``, ours by the forward pass of training.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from triptych.checkpoints.hf.export_problems import file_problems, weight_problems
from triptych.checkpoints.locate import locate
from triptych.configs.schema import Precision
from triptych.data.loading.collate import collate
from triptych.data.media.image import decode_image, normalize_patches
from triptych.errors import CheckpointError
from triptych.launch.inference.answering import TIMEOUT_S, Answerer, Question
from triptych.models.generate import next_logits
from triptych.parallel.agree import SingleProcess
from triptych.parallel.mesh import build_mesh, init_distributed

PROMPT = "What is this?"
MAX_NEW_TOKENS = 8
LOGITS_BAR = 1e-4
"""Largest difference / largest logit, in fp32; between right models it is rounding."""


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
    from transformers.utils import is_torchvision_available

    from triptych.checkpoints.hf.processor import load_processor

    ours = Answerer.load(folder, exported, Precision.fp32)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(exported)
    exported_dtype = theirs.dtype
    theirs = theirs.float().eval()
    for parameter in ours.model.parameters():
        parameter.data = parameter.data.to(exported_dtype).float()
    processor = load_processor(exported)
    for question in _questions():
        mine = ours.prompt(question)
        prompt = _prompt_of_transformers(processor, question)
        if prompt["input_ids"][0].tolist() != mine.input_ids.tolist():
            report.problems.append(f"{question.where}: the processor makes other ids than training")
            continue
        if question.image is not None:
            pixels = normalize_patches(torch.from_numpy(mine.pixels[0]))
            apart = float((prompt["pixel_values"] - pixels).abs().max())
            backend = "torchvision" if is_torchvision_available() else "Pillow"
            line = f"{question.where}: pixels by {backend}, at most {apart:.2g} from training's"
            report.told.append(line)
            if apart > 0 and backend == "Pillow":
                report.problems.append(line)
        wanted = next_logits(ours.model, collate([mine], ours.config, pad_to=1, with_pixels=True))[
            0
        ]
        with torch.no_grad():
            found = theirs(**prompt).logits[0, -1]
        apart = float((found - wanted).abs().max() / wanted.abs().max())
        line = f"{question.where}: logits {apart:.1e} of the largest from ours"
        report.told.append(line)
        if apart > LOGITS_BAR:
            report.problems.append(f"{line}, more than {LOGITS_BAR:g}")
        [answer] = ours.answer([question], max_new_tokens=MAX_NEW_TOKENS)
        other = _answer_of_transformers(theirs, prompt)
        if answer == other:
            text = ours.tokenizer.decode(answer)
            report.told.append(f"{question.where}: both answer {text!r} ({len(answer)} tokens)")
        else:
            report.problems.append(
                f"{question.where}: transformers answers {ours.tokenizer.decode(other)!r}, "
                f"we {ours.tokenizer.decode(answer)!r}"
            )


def _questions() -> Iterator[Question]:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((180, 130)).convert("RGB").save(file, "PNG")
    yield Question(file.getvalue(), PROMPT, "an image")
    yield Question(None, PROMPT, "text alone")


def _prompt_of_transformers(processor: Any, question: Question) -> Any:
    content: list[dict[str, str]] = [{"type": "text", "text": question.prompt}]
    images = None
    if question.image is not None:
        content = [{"type": "image"}, *content]
        images = [decode_image(question.image, question.where)]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return processor(text=[chat], images=images, return_tensors="pt")


@torch.no_grad()
def _answer_of_transformers(model: Any, prompt: Any) -> list[int]:
    """Ids of the answer, without the token that ends it."""
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    new: list[int] = ids[0, prompt["input_ids"].shape[1] :].tolist()
    ends = [i for i, token in enumerate(new) if token in model.generation_config.eos_token_id]
    return new[: ends[0]] if ends else new

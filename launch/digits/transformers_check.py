"""What transformers reads from an exported model: its own tokenizer, chat, pixels and decoding."""

from pathlib import Path

import torch

from triptych.data.digits.images import heldout_images
from triptych.data.digits.texts import READ
from triptych.launch.digits.evaluate import MAX_NEW_TOKENS


def transformers_answers(export: Path, num_images: int, *, seed: int) -> list[list[int]]:
    """Greedy answers about the first held-out pictures, one picture at a time, in silence.

    Returns:
        Ids of each answer, without the token that ends it.
    """
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    from triptych.checkpoints.hf.processor import load_processor

    disable_progress_bar()
    model = Qwen2VLForConditionalGeneration.from_pretrained(export).eval()
    processor = load_processor(export)
    content = [{"type": "image"}, {"type": "text", "text": READ}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    answers = []
    for picture in heldout_images(num_images, seed):
        prompt = processor(images=[picture.image], text=[chat], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new = ids[0, prompt["input_ids"].shape[1] :].tolist()
        ends = [i for i, token in enumerate(new) if token in model.generation_config.eos_token_id]
        answers.append(new[: ends[0]] if ends else new)
    return answers

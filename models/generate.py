"""Greedy decoding over packed prompts.

All prompts go through the model together, one segment each, and whole again for every new token:
right for answers of a few tokens, and the very forward pass that training runs.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from triptych.configs.model_schema import ModelConfig
from triptych.data.loading.collate import Segment, collate


def greedy(
    model: nn.Module, prompts: Sequence[Segment], config: ModelConfig, *, max_new_tokens: int
) -> list[list[int]]:
    """Continue each prompt with its most likely tokens.

    O(max_new_tokens) forward passes over all prompts that are not yet answered.

    Args:
        model: whole, in this process: tp = pp = 1.
        prompts: with pixels.
        config: of the model.
        max_new_tokens: an answer is cut there.

    Returns:
        The new ids of each prompt, up to and without ``<|im_end|>`` or ``<|endoftext|>``.
    """
    tokens = config.tokens
    answers: list[list[int]] = [[] for _ in prompts]
    open_prompts = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not open_prompts:
            break
        segments = [_extended(prompts[i], answers[i]) for i in open_prompts]
        next_ids = next_logits(model, segments, config).argmax(dim=-1).tolist()
        going_on = [
            (i, token)
            for i, token in zip(open_prompts, next_ids, strict=True)
            if token not in (tokens.im_end, tokens.endoftext)
        ]
        for i, token in going_on:
            answers[i].append(token)
        open_prompts = [i for i, _ in going_on]
    return answers


@torch.no_grad()
def next_logits(model: nn.Module, segments: Sequence[Segment], config: ModelConfig) -> Tensor:
    """(num_segments, vocab): what the model thinks of the token after each segment."""
    device = next(model.parameters()).device
    batch = collate(segments, config, pad_to=1, with_pixels=True)
    last_S = torch.tensor(batch.segments[1:], device=device) - 1
    batch = batch.each(lambda tensor: tensor.to(device))
    logits_TV: Tensor = model(batch, with_loss=False).squeeze(0)
    return logits_TV[last_S]


def _extended(prompt: Segment, answer: Sequence[int]) -> Segment:
    """The prompt and what was answered so far; nothing is a target."""
    input_ids = np.append(prompt.input_ids, np.array(answer, dtype=prompt.input_ids.dtype))
    return replace(prompt, input_ids=input_ids, targets=np.zeros(len(input_ids), dtype=np.uint8))

"""Greedy decoding over packed prompts.

All prompts go through the model together, one segment each, by the very forward pass that training
runs; then one token of each, which attends to the keys and values that were kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from triptych.configs.model_schema import ModelConfig
from triptych.data.loading.collate import Segment, collate
from triptych.data.types import Batch
from triptych.models.kv_cache import KeyValueCache


def greedy(
    model: nn.Module,
    prompts: Sequence[Segment],
    config: ModelConfig,
    *,
    max_new_tokens: int,
    tell: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt with its most likely tokens.

    Args:
        model: whole, in this process: tp = pp = 1.
        prompts: with pixels.
        config: of the model.
        max_new_tokens: an answer is cut there.
        tell: is given the number of a prompt and its next id, as they come.

    Returns:
        The new ids of each prompt, up to and without ``<|im_end|>`` or ``<|endoftext|>``.
    """
    ends = (config.tokens.im_end, config.tokens.endoftext)
    answers: list[list[int]] = [[] for _ in prompts]
    open_prompts, cache = list(range(len(prompts))), KeyValueCache()
    batch = whole = collate(prompts, config, pad_to=1, with_pixels=True)
    positions = [int(whole.position_ids[:, a:b].max()) for a, b in pairwise(whole.segments)]
    for number in range(1, max_new_tokens + 1):
        cache.slots = open_prompts
        next_ids = next_logits(model, batch, cache).argmax(dim=-1).tolist()
        found = zip(open_prompts, next_ids, strict=True)
        new = [(i, token) for i, token in found if token not in ends]
        for i, token in new:
            answers[i].append(token)
            if tell is not None:
                tell(i, token)
        open_prompts = [i for i, _ in new]
        if not open_prompts:
            break
        at = [positions[i] + number for i in open_prompts]
        batch = _one_token_each(whole, [token for _, token in new], at)
    return answers


@torch.no_grad()
def next_logits(model: nn.Module, batch: Batch, cache: KeyValueCache | None = None) -> Tensor:
    """(num_segments, vocab): what the model thinks of the token after each segment.

    Args:
        model: whole, in this process.
        batch: on the CPU.
        cache: of what came before these segments.
    """
    device = next(model.parameters()).device
    last_S = torch.tensor(batch.segments[1:], device=device) - 1
    on_device = batch.each(lambda tensor: tensor.to(device))
    logits_TV: Tensor = model(on_device, with_loss=False, cache=cache).squeeze(0)
    return logits_TV[last_S]


def _one_token_each(prompts: Batch, ids: Sequence[int], positions: Sequence[int]) -> Batch:
    """Segments of one token that follow prompts; text, whatever token it is."""
    bounds = list(range(len(ids) + 1))
    ids_S = torch.tensor(ids)
    return replace(
        prompts,
        input_ids=ids_S,
        labels=ids_S,
        loss_mask=torch.zeros(len(ids), dtype=torch.bool),
        position_ids=torch.tensor(positions).expand(3, -1),
        segments=bounds,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        vision_index=prompts.vision_index[:0],
        pixel_values=None,
        num_tokens=len(ids),
        num_patches=0,
    )

"""Greedy decoding: the answers of transformers, prompt by prompt, although ours are packed."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from triptych.configs.model_schema import ModelConfig
from triptych.data.loading.collate import Segment, collate
from triptych.data.types import SampleId
from triptych.models.generate import greedy, next_logits
from triptych.tests.helpers.reference import (
    TOKENS,
    conversations,
    normalized,
    save_reference,
    small_model,
    transformers_model,
)
from triptych.tests.helpers.single import alone, load_ours, segments_of

MAX_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(ours, theirs) of prompts with no, one and several images, on random weights."""
    config = small_model(heads=4, kv_heads=2, tied=False)
    reference = transformers_model(config, seed=3)
    folder = save_reference(reference, tmp_path_factory.mktemp("reference"))
    samples = [sample for seed in range(3) for sample in conversations(seed)]
    with alone() as mesh:
        ours = load_ours(folder, config, mesh).eval()
        prompts = segments_of(samples)
        mine = greedy(ours, prompts, config, max_new_tokens=MAX_NEW_TOKENS)
        cut = greedy(ours, prompts, config, max_new_tokens=1)
    return mine, [_generate(reference, sample) for sample in samples], cut


def _generate(reference, sample):
    """What transformers generates, without the end token."""
    ids = torch.tensor(sample.input_ids[None].astype(np.int64))
    images = {}
    if sample.grids:
        images = {
            "pixel_values": normalized(sample.pixels).float(),
            "image_grid_thw": torch.tensor(sample.grids),
        }
    with torch.no_grad():
        out = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == TOKENS.image_pad).int(),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=[TOKENS.im_end, TOKENS.endoftext],
            pad_token_id=TOKENS.endoftext,
            **images,
        )[0, ids.shape[1] :].tolist()
    ends = [i for i, token in enumerate(out) if token in (TOKENS.im_end, TOKENS.endoftext)]
    return out[: ends[0]] if ends else out


def test_packed_prompts_are_answered_as_transformers_answers_each(answers):
    ours, theirs, _ = answers
    assert ours == theirs


def test_an_answer_is_cut_at_the_limit(answers):
    ours, _, cut = answers
    assert max(map(len, ours)) == MAX_NEW_TOKENS
    assert cut == [answer[:1] for answer in ours]


@pytest.mark.parametrize(("kv_heads", "tied"), [(2, False), (4, True)])
def test_kept_keys_and_values_change_no_token(kv_heads, tied, tmp_path):
    """Of prompts of several lengths, with images and without; printed: CPU-seconds."""
    config = small_model(heads=4, kv_heads=kv_heads, tied=tied)
    save_reference(transformers_model(config, seed=4), tmp_path)
    samples = [sample for seed in range(3) for sample in conversations(seed)]
    told: list[tuple[int, int]] = []
    with alone() as mesh:
        ours, prompts = load_ours(tmp_path, config, mesh).eval(), segments_of(samples)
        start = time.process_time()
        kept = greedy(
            ours, prompts, config, max_new_tokens=32, tell=lambda *token: told.append(token)
        )
        middle = time.process_time()
        whole = whole_again_for_each_token(ours, prompts, config, 32)
        end = time.process_time()
    print(
        f"32 tokens of {len(prompts)}: {middle - start:.2f} with cache, {end - middle:.2f} without"
    )
    assert [answer[: len(other)] for answer, other in zip(kept, whole, strict=True)] == whole
    assert max(map(len, whole)) == 32
    for i, answer in enumerate(kept):
        assert [token for number, token in told if number == i] == answer


def whole_again_for_each_token(model, prompts, config, max_new_tokens):
    """Greedy decoding by the forward pass of training alone, one prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = prompt.input_ids.tolist()
        for _ in range(max_new_tokens):
            targets = np.zeros(len(ids), np.uint8)
            extended = replace(prompt, input_ids=np.array(ids, np.int32), targets=targets)
            batch = collate([extended], config, pad_to=1, with_pixels=True)
            token = int(next_logits(model, batch).argmax())
            if token in (TOKENS.im_end, TOKENS.endoftext, TOKENS.image_pad, TOKENS.video_pad):
                break  # a placeholder that it says is no image
            ids.append(token)
        answers.append(ids[len(prompt.input_ids) :])
    return answers


class Scripted(torch.nn.Module):
    """Says after each segment what the script names for its length."""

    def __init__(self, script):
        super().__init__()
        self.script, self.weight = script, torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, batch, *, with_loss, cache):
        bounds = batch.segments
        self.calls.append(len(bounds) - 1)
        logits = torch.zeros(1, bounds[-1], 64)
        for end in bounds[1:]:
            length = int(batch.position_ids[0, end - 1]) + 1
            logits[0, end - 1, self.script[length]] = 1.0
        return logits


@pytest.mark.parametrize("end", [TOKENS.im_end, TOKENS.endoftext])
def test_either_end_token_ends_an_answer_and_frees_its_place(end):
    script = {2: 30, 3: end, 5: 40, 6: 41, 7: end}
    prompts = [
        Segment(
            SampleId(0, i),
            np.full(length, 20, np.int32),
            np.zeros(length, np.uint8),
            np.zeros((0, 3), np.int64),
            (),
        )
        for i, length in enumerate([2, 5, 3])
    ]
    model = Scripted(script)
    assert greedy(model, prompts, ModelConfig(tokens=TOKENS), max_new_tokens=9) == [
        [30],
        [40, 41],
        [],
    ]
    assert model.calls == [3, 2, 1]

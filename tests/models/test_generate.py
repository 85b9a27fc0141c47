"""Greedy decoding: the answers of transformers, prompt by prompt, although ours are packed; and the
same tokens in every layout.
"""

import time
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.data.loading.collate import Segment, collate
from triptych.data.types import SampleId
from triptych.models.build import build_model
from triptych.models.generate import greedy, next_logits
from triptych.models.kernels import choose_here
from triptych.models.qwen_vl.model import Qwen2VL
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.layouts import Layout, LayoutCase, config_of, engine_of
from triptych.tests.helpers.limits import HANG_S
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
        mine = answers_of(ours, prompts, config, mesh, max_new_tokens=MAX_NEW_TOKENS)
        cut = answers_of(ours, prompts, config, mesh, max_new_tokens=1)
    return mine, [_generate(reference, sample) for sample in samples], cut


def answers_of(model, prompts, config, mesh, **options):
    """Of one batch, by one process."""
    batch = collate(prompts, config, pad_to=1, with_pixels=True)
    return greedy([model], [batch], config, mesh, **options)


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
        kept = answers_of(
            ours, prompts, config, mesh, max_new_tokens=32, tell=lambda *new: told.append(new)
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


@pytest.mark.parametrize("end", [TOKENS.im_end, TOKENS.endoftext])
def test_either_end_token_ends_an_answer_and_frees_its_place(end):
    """The model says after each prompt what the script names for the number of tokens so far."""
    script = {2: 30, 3: end, 5: 40, 6: 41, 7: end}
    config = small_model(heads=4, kv_heads=4, tied=True, num_layers=1)
    prompts = [segment_of_text(i, length) for i, length in enumerate([2, 5, 1])]
    calls = []

    def scripted(model, batch, *, cache):
        calls.append(len(batch.segments) - 1)
        lengths = [int(batch.position_ids[0, last - 1]) + 1 for last in batch.segments[1:]]
        return torch.tensor([script.get(length, end) for length in lengths])

    with alone() as mesh, mock.patch.object(Qwen2VL, "forward", scripted):
        layers, kernels = [1], choose_here(Kernels.auto, Precision.fp32)
        [model] = build_model(config, ParallelConfig(), Precision.fp32, layers, mesh, kernels)
        answers = answers_of(model, prompts, config, mesh, max_new_tokens=9)
    assert answers == [[30], [40, 41], []]
    assert calls == [3, 2, 1]


def segment_of_text(number, length):
    ids, targets = np.full(length, 20, np.int32), np.zeros(length, np.uint8)
    return Segment(SampleId(0, number), ids, targets, np.zeros((0, 3), np.int64), ())


CASES = [
    LayoutCase(Layout(tp=2, pp=2, layers=(1, 3)), tied=True),
    LayoutCase(Layout(tp=2, dp=2, sequence_parallel=True), tied=True, zero="megatron+all"),
    LayoutCase(Layout(pp=2, dp=2, layers=(1, 1, 1, 1), vpp=2), tied=True, zero="megatron+all"),
]
MORE_CASES = [
    LayoutCase(Layout(tp=4), tied=True),
    LayoutCase(Layout(pp=4, layers=(1, 1, 1, 1)), tied=True, zero="deepspeed", llm="full"),
    LayoutCase(Layout(dp=4), tied=True),
]


@pytest.mark.distributed
@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE_CASES, marks=pytest.mark.slow)])
def test_the_same_tokens_in_every_layout(pool, cases):
    """Chunks wrapped for data parallelism as in training; dp ranks have prompts of their own."""
    outcomes = pool(4).run(answers_by_layout, cases=cases)
    whole = {i: answer for of_rank, *_ in outcomes for i, answer in of_rank.items()}
    assert max(map(len, whole.values())) == 32
    for rank, (_, by_case, cpu_s) in enumerate(outcomes):
        print(f"rank {rank}: {cpu_s:.1f} CPU-seconds")
        for case, answers in by_case.items():
            assert answers == {i: whole[i] for i in answers}, (rank, case)


def answers_by_layout(cases):
    """Prompt -> answer: of the whole model on this rank, and in each layout; CPU-seconds."""
    started_s = time.process_time()
    samples = conversations(0) + conversations(1)[:4]
    by_case = {}
    for case in cases:
        engine = engine_of(case)
        mesh, config = engine.mesh, config_of(case).model
        mine = range(mesh.dp_rank, len(samples), mesh.dims.dp)
        prompts = segments_of([samples[i] for i in mine])
        if not mesh.reads_media:
            prompts = [replace(prompt, pixels=()) for prompt in prompts]
        batches = [
            collate(part, config, pad_to=mesh.dims.tp, with_pixels=mesh.reads_media)
            for part in (prompts[:1], prompts[1:])
        ]
        answers = greedy(engine.chunks, batches, config, mesh, max_new_tokens=32)
        by_case[str(case)] = dict(zip(mine, answers, strict=True))
    mesh = build_mesh(1, 1, seed=0, timeout_s=HANG_S)
    [model] = engine_of(LayoutCase(Layout(), tied=True), mesh).bare_chunks
    prompts, mine = segments_of(samples), range(mesh.rank, len(samples), 4)
    whole = {i: answers_of(model, [prompts[i]], config, mesh, max_new_tokens=32)[0] for i in mine}
    return whole, by_case, time.process_time() - started_s

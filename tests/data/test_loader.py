"""The loader over real dataset folders: the same steps in any layout, from any place."""

import contextlib
import json
import threading
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.configs.model_schema import LanguageConfig, ModelConfig, VisionConfig
from triptych.configs.schema import Oversize
from triptych.data.dataset.dataset import Dataset
from triptych.data.loading.loader import Loader, validation_step
from triptych.data.loading.reader import BatchFormat
from triptych.data.media.image import decode_image
from triptych.data.plan.order import Cursor, Plan
from triptych.data.plan.plan_sources import plan_sources
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import train_tokenizer
from triptych.data.types import PixelLimits
from triptych.errors import DataError
from triptych.tests.helpers.image_patches import image_patches

VISION = VisionConfig()
LIMITS = PixelLimits(min_pixels=28 * 28, max_pixels=16 * 28 * 28)
GLOBAL_BATCH_SIZE = 8


def image_part(name):
    return {"type": "image", "image": name}


def records(rng, images):
    """Captions, two images in a question, and text, in turn."""
    for i in range(60):
        first, second = rng.choice(images, 2).tolist()
        words = " ".join(["word"] * int(rng.integers(1, 40)))
        yield [
            {"content": [image_part(first), {"type": "text", "text": words}]},
            {
                "messages": [
                    {"role": "user", "content": [image_part(first), image_part(second)]},
                    {"role": "assistant", "content": words},
                ]
            },
            {"text": f"{i} {words}"},
        ][i % 3]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["word word"], tmp_path_factory.mktemp("tokenizer"), 300)


def build(folder, tokenizer, all_records):
    rng = np.random.default_rng(0)
    images = [f"{i}.png" for i in range(12)]
    for name in images:
        height, width = rng.integers(20, 180, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    lines = folder / "in.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in all_records(rng, images)))
    build_dataset([lines], folder / "set", tokenizer, images=[folder])
    return folder / "set"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tokenizer):
    return Dataset.open(build(tmp_path_factory.mktemp("mixed"), tokenizer, records), "mixed")


@pytest.fixture(scope="module")
def text(tmp_path_factory, tokenizer):
    def only_text(rng, _):
        return ({"text": " ".join(["word"] * int(n))} for n in rng.integers(1, 60, 25))

    return Dataset.open(build(tmp_path_factory.mktemp("text"), tokenizer, only_text), "text")


def model_for(tokenizer, vocab_size=None) -> ModelConfig:
    """The parts of a model that the reader asks for."""
    language = LanguageConfig(vocab_size=vocab_size or tokenizer.vocab_size)
    return ModelConfig(tokens=tokenizer.tokens, language=language, vision=VISION)


def make_plan(sources, weights=None, *, seed=0, window=96, max_epochs=None):
    weights = weights or {source.name: 1 for source in sources}
    return Plan(
        plan_sources(sources, weights, LIMITS, VISION, max_epochs),
        seed=seed,
        seq_len=128,
        max_patches=512,
        window=window,
        oversize=Oversize.skip,
    )


@pytest.fixture
def open_loader(mixed, text, tokenizer):
    """Loaders over both datasets, closed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def opened(
            cursor=None,
            *,
            sources=(mixed, text),
            vocab_size=None,
            pad_to=1,
            read_pixels=True,
            pin_memory=False,
            max_epochs=None,
            **arguments,
        ):
            plan = make_plan(sources, max_epochs=max_epochs)
            form = BatchFormat(
                model=model_for(tokenizer, vocab_size),
                limits=LIMITS,
                pad_to=pad_to,
                read_pixels=read_pixels,
                pin_memory=pin_memory,
            )
            defaults = {
                "dp_rank": 0,
                "dp_size": 1,
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "micro_batch_size": 1,
                "cost": lambda load: load.num_tokens + load.num_patches,
                "num_workers": 2,
                "prefetch_steps": 0,
            }
            loader = Loader(plan, sources, cursor or plan.start, form, **defaults | arguments)
            return stack.enter_context(contextlib.closing(loader))

        yield opened


def take(loader, num_steps):
    return [next(loader) for _ in range(num_steps)]


def contents(step):
    """All that a step holds, comparable."""
    tensors = ("input_ids", "labels", "loss_mask", "position_ids", "pixel_values")
    return (
        step.packs,
        step.unreadable,
        [
            (batch.sample_ids, batch.segments, [getattr(batch, name).tolist() for name in tensors])
            for batch in step.microbatches
        ],
    )


def test_batches_hold_the_samples_of_the_packs(open_loader, mixed, text):
    """Ids, targets and pixels of every segment are those of its sample, read one by one."""
    (step,) = take(open_loader(), 1)
    for batch in step.microbatches:
        patches = 0
        for number, (source, index) in enumerate(batch.sample_ids):
            dataset = (mixed, text)[source]
            start, end = batch.segments[number], batch.segments[number + 1]
            sample = dataset.sample(index)
            assert end - start == dataset.sizes(LIMITS, VISION).num_tokens[index]
            once = batch.input_ids[start:end].unique_consecutive().tolist()
            assert once == torch.tensor(sample.input_ids).unique_consecutive().tolist()
            assert batch.loss_mask[start:end].sum() == sample.targets[1:].sum()
            for media in sample.media:
                expected, _ = image_patches(
                    decode_image(dataset.read_media(media), ""), LIMITS, VISION
                )
                found = batch.pixel_values[patches : patches + len(expected)]
                assert np.array_equal(found.numpy(), expected)
                patches += len(expected)
        assert patches == batch.num_patches == len(batch.pixel_values)
        assert 4 * len(batch.vision_index) == patches


def packs_of_steps(open_loader, dp_size, micro_batch_size, num_steps, cursor=None, **arguments):
    """For each step, which samples each pack holds, over all ranks."""
    loaders = [
        open_loader(
            cursor,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch_size=micro_batch_size,
            read_pixels=False,
            **arguments,
        )
        for rank in range(dp_size)
    ]
    steps = []
    for _ in range(num_steps):
        shares = [next(loader) for loader in loaders]
        assert {len(step.packs) for step in shares} == {GLOBAL_BATCH_SIZE // dp_size}
        samples = Counter(i for s in shares for batch in s.microbatches for i in batch.sample_ids)
        steps.append((sorted(pack for step in shares for pack in step.packs), samples))
    return steps, loaders[0].cursor


@pytest.mark.parametrize(
    ("dp_size", "micro_batch_size"), [(1, 2), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)]
)
def test_a_global_batch_is_the_same_in_every_layout(open_loader, dp_size, micro_batch_size):
    reference, cursor = packs_of_steps(open_loader, 1, 1, 5)
    steps, other = packs_of_steps(open_loader, dp_size, micro_batch_size, 5)
    assert steps == reference
    assert other == cursor
    assert [packs for packs, _ in steps] == [list(range(8 * i, 8 * i + 8)) for i in range(5)]


def test_there_may_be_more_ranks_than_samples(open_loader, tokenizer, tmp_path):
    """Packs are as with one rank, and no sample comes much more often than another."""

    def three(rng, _):
        return ({"text": " ".join(["word"] * 30 * n)} for n in (1, 2, 3))

    few = (Dataset.open(build(tmp_path, tokenizer, three), "few"),)
    reference, _ = packs_of_steps(open_loader, 1, 1, 6, sources=few)
    steps, _ = packs_of_steps(open_loader, 8, 1, 6, sources=few)
    assert steps == reference
    read = sum((samples for _, samples in steps), Counter())
    assert set(read) == {(0, 0), (0, 1), (0, 2)}
    assert max(read.values()) - min(read.values()) <= GLOBAL_BATCH_SIZE


def test_microbatches_go_in_the_order_that_their_workloads_are_given(open_loader):
    seen = []

    def backwards(loads):
        seen.append(loads)
        return range(len(loads))[::-1]

    (plain,) = take(open_loader(micro_batch_size=2), 1)
    (ordered,) = take(open_loader(micro_batch_size=2, order=backwards), 1)
    assert contents(ordered)[2] == contents(plain)[2][::-1]
    assert [load.num_tokens for load in seen[0]] == [b.num_tokens for b in plain.microbatches]
    assert [load.num_patches for load in seen[0]] == [b.num_patches for b in plain.microbatches]


def test_every_rank_tells_how_uneven_the_shares_are(open_loader):
    """The dearest over the mean, added up from the batches of all ranks."""
    loaders = [open_loader(dp_rank=r, dp_size=4, cost=cost_of) for r in range(4)]
    for _ in range(3):
        shares = [next(loader) for loader in loaders]
        costs = [sum(cost_of(batch.workload) for batch in step.microbatches) for step in shares]
        expected = max(costs) * 4 / sum(costs)
        assert [step.imbalance for step in shares] == pytest.approx([expected] * 4)
    assert next(open_loader()).imbalance == 1.0


def cost_of(load):
    return load.num_tokens + load.num_patches


def test_changing_layout_on_resume_loses_and_repeats_nothing(open_loader):
    whole, _ = packs_of_steps(open_loader, 1, 1, 9)
    parts, cursor = [], None
    for dp_size, micro_batch_size, num_steps in [(4, 1, 2), (1, 2, 3), (8, 1, 1), (2, 4, 3)]:
        steps, cursor = packs_of_steps(open_loader, dp_size, micro_batch_size, num_steps, cursor)
        cursor = Cursor.from_json(json.loads(json.dumps(cursor.to_json())))
        parts += steps
    assert parts == whole


@pytest.mark.parametrize(
    ("num_workers", "prefetch_steps"), [(0, 0), (0, 3), (1, 0), (1, 3), (4, 0), (8, 2)]
)
def test_threads_and_reading_ahead_change_nothing(open_loader, num_workers, prefetch_steps):
    reference = [contents(step) for step in take(open_loader(num_workers=2), 4)]
    loader = open_loader(num_workers=num_workers, prefetch_steps=prefetch_steps)
    assert [contents(step) for step in take(loader, 4)] == reference


def test_without_workers_no_thread_is_started_and_nothing_read_ahead(
    open_loader, mixed, monkeypatch
):
    asked_by = set()
    read_media = mixed.read_media

    def noted(media):
        asked_by.add(threading.current_thread())
        return read_media(media)

    monkeypatch.setattr(mixed, "read_media", noted)
    before = threading.active_count()
    loader = open_loader(num_workers=0, prefetch_steps=3)
    steps = take(loader, 3)
    assert threading.active_count() == before
    assert asked_by == {threading.current_thread()}
    media = sum(len(batch.grid_thw) for step in steps for batch in step.microbatches)
    assert loader.num_decoded == media > 0
    threaded = open_loader()
    take(threaded, 3)
    assert threaded.cursor == loader.cursor


def test_cursor_is_after_the_step_handed_out_however_far_it_reads_ahead(open_loader):
    whole = [contents(step) for step in take(open_loader(), 6)]
    loader = open_loader(prefetch_steps=4)
    take(loader, 2)
    assert loader.cursor.num_packs == 2 * GLOBAL_BATCH_SIZE
    resumed = open_loader(loader.cursor, prefetch_steps=1)
    assert [contents(step) for step in take(resumed, 4)] == whole[2:]


def test_it_reads_as_far_ahead_as_asked(open_loader):
    handed_out_and_ahead = open_loader()
    take(handed_out_and_ahead, 1 + 3)
    loader = open_loader(prefetch_steps=3)
    take(loader, 1)
    while loader.num_decoded < handed_out_and_ahead.num_decoded:
        time.sleep(0.01)
    time.sleep(0.1)
    assert loader.num_decoded == handed_out_and_ahead.num_decoded


@pytest.mark.parametrize("read_pixels", [True, False])
def test_each_image_is_decoded_once_and_only_where_pixels_are_read(open_loader, read_pixels):
    loader = open_loader(read_pixels=read_pixels)
    steps = take(loader, 3)
    num_media = sum(len(batch.grid_thw) for step in steps for batch in step.microbatches)
    assert num_media > 0
    assert loader.num_decoded == (num_media if read_pixels else 0)
    for step in steps:
        for batch in step.microbatches:
            assert (batch.pixel_values is not None) == read_pixels


def test_all_that_is_uploaded_is_pinned(open_loader, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))
    for batch in next(open_loader(pin_memory=True)).microbatches:
        moved = []
        batch.each(moved.append)
        assert all(tensor.is_meta for tensor in moved)
        assert not batch.loss_mask.is_meta


def test_text_only_sources_need_no_pixels(open_loader, text):
    loader = open_loader(sources=(text,), pad_to=8)
    for batch in take(loader, 2)[1].microbatches:
        assert batch.pixel_values.shape == (0, 1176)
        assert len(batch.input_ids) % 8 == 0
    assert loader.num_decoded == 0


def test_packs_are_joined_by_micro_batch_size(open_loader, mixed, text):
    (step,) = take(open_loader(micro_batch_size=4, pad_to=4), 1)
    assert len(step.microbatches) == 2
    packs = make_plan((mixed, text)).first_packs(8)
    for number, batch in enumerate(step.microbatches):
        expected = [packs[i].samples for i in step.packs[4 * number : 4 * number + 4]]
        assert batch.sample_ids == sum(expected, ())


# -- what goes wrong


@pytest.fixture
def damaged(tmp_path, tokenizer):
    """A dataset of which one image has a flipped byte, and that image's samples."""
    folder = build(tmp_path, tokenizer, records)
    dataset = Dataset.open(folder, "mixed")
    broken = dataset.sample(0).media[0]
    shard = folder / "shards" / "000000.tar"
    data = bytearray(shard.read_bytes())
    data[broken.offset + broken.size // 2] ^= 1
    shard.write_bytes(data)
    return dataset


def test_unreadable_media_are_zeros_and_reported(open_loader, damaged, tokenizer):
    loader = open_loader(sources=(damaged,))
    steps = take(loader, 12)
    spots = [(step, sample) for step in steps for sample in step.unreadable]
    found = set()
    for step, sample in spots:
        _, index = step.microbatches[sample.microbatch].sample_ids[sample.segment]
        found.add(index)
        assert f"mixed, sample {index}" in sample.reason
        assert "damaged" in sample.reason
    assert found == {0}
    blank = [patches for step in steps for b in step.microbatches for patches in [b.pixel_values]]
    assert sum(int((pixels.amax(1) == 0).sum()) for pixels in blank) == len(spots) * int(
        damaged.sizes(LIMITS, VISION).num_patches[0]
    )


def test_an_image_of_another_size_than_recorded_is_reported(open_loader, mixed, monkeypatch):
    larger = mixed.read_media(mixed.sample(1).media[0])
    monkeypatch.setattr(mixed, "read_media", lambda media: larger)
    (step,) = take(open_loader(sources=(mixed,)), 1)
    assert any("but its dataset says" in sample.reason for sample in step.unreadable)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_thread_is_raised_and_ends_all_threads(
    open_loader, mixed, monkeypatch, num_workers
):
    def broken(index):
        raise RuntimeError("disk on fire")

    before = threading.active_count()
    loader = open_loader(sources=(mixed,), prefetch_steps=2, num_workers=num_workers)
    monkeypatch.setattr(mixed, "sample", broken)
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(loader)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError):
        next(loader)


def test_close_ends_all_threads(open_loader):
    before = threading.active_count()
    loader = open_loader(num_workers=4, prefetch_steps=4)
    take(loader, 1)
    assert threading.active_count() > before
    loader.close()
    assert threading.active_count() == before


def test_a_token_that_the_model_does_not_know_is_refused(open_loader, tokenizer):
    """Under tensor parallelism an embedding would take it for a token of another rank, silently."""
    known = tokenizer.vocab_size // 2
    with pytest.raises(DataError, match=f"is not from 0 to {known - 1}, model.language.vocab_size"):
        next(open_loader(vocab_size=known))


# -- validation


@pytest.mark.parametrize(
    ("dp_size", "micro_batch_size"), [(1, 1), (2, 1), (3, 1), (4, 2), (2, 3), (8, 2)]
)
def test_validation_supervises_the_same_tokens_in_every_layout(
    mixed, text, tokenizer, dp_size, micro_batch_size
):
    form = BatchFormat(
        model=model_for(tokenizer),
        limits=LIMITS,
        pad_to=4,
        read_pixels=False,
        pin_memory=False,
    )
    validate = partial(
        validation_step, sources=(mixed, text), form=form, num_packs=10, num_workers=2
    )

    def supervised(dp_size, micro_batch_size):
        steps = [
            validate(
                make_plan((mixed, text)),
                dp_rank=rank,
                dp_size=dp_size,
                micro_batch_size=micro_batch_size,
            )
            for rank in range(dp_size)
        ]
        num_microbatches = {len(step.microbatches) for step in steps}
        targets = Counter()
        for step in steps:
            for batch in step.microbatches:
                for number, sample in enumerate(batch.sample_ids):
                    start, end = batch.segments[number], batch.segments[number + 1]
                    targets[sample] += int(batch.loss_mask[start:end].sum())
        return targets, num_microbatches

    reference, _ = supervised(1, 1)
    targets, num_microbatches = supervised(dp_size, micro_batch_size)
    assert targets == reference
    assert num_microbatches == {-(-10 // (dp_size * micro_batch_size))}


@pytest.mark.parametrize("prefetch_steps", [0, 1, 3])
def test_steps_end_with_the_last_whole_one(open_loader, text, prefetch_steps):
    """Every dp rank says so beside the same step, however far it reads ahead, from any place."""
    limit = {"max_epochs": {"text": 20}, "sources": [text], "prefetch_steps": prefetch_steps}
    packs = make_plan([text], max_epochs=limit["max_epochs"]).first_packs(1000)
    num_steps = len(packs) // GLOBAL_BATCH_SIZE
    assert num_steps > 3
    assert len(packs) % GLOBAL_BATCH_SIZE
    for dp_rank in range(2):
        loader = open_loader(dp_rank=dp_rank, dp_size=2, **limit)
        told, cursors = [], []
        for _ in loader:
            told.append(loader.is_over)
            cursors.append(loader.cursor)
        assert told == [False] * (num_steps - 1) + [True]
        resumed = open_loader(cursors[-3], dp_rank=dp_rank, dp_size=2, **limit)
        assert [resumed.is_over for _ in resumed] == [False, True]

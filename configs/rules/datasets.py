"""Datasets and their mixture, and whether the largest image and video fit a pack."""

from collections.abc import Iterator
from difflib import get_close_matches
from math import inf
from pathlib import Path

from triptych.configs.problems import Problem, either, from_hub, typed_list
from triptych.configs.schema import Config, WeighBy

MOST_EPOCHS = 10**6
"""Far more than anybody has asked for."""


def check_data(config: Config) -> Iterator[Problem]:
    """The stage has a mixture of datasets that exist."""
    data, name = config.data, config.stage.name
    mixture = f"data.mixtures.{name}"
    weights = {f"{mixture}.{source}": w for source, w in data.mixtures.get(name, {}).items()}
    read = {*data.mixtures.get(name, {}), *(data.validation if config.train.validate_every else {})}
    read |= {*(data.evaluation if config.train.evaluate_every else [])}
    weights |= {f"data.validation.{source}": w for source, w in data.validation.items()}
    if not data.mixtures.get(name):
        yield Problem(f"{mixture} is empty: stage.name={name} has no data", f"{mixture}.SOURCE=1.0")
    if config.train.validate_every and not data.validation:
        yield Problem(
            f"train.validate_every={config.train.validate_every} has no data.validation to read",
            "train.validate_every=0 or data.validation.SOURCE=1.0",
        )
    if config.train.evaluate_every and not data.evaluation:
        yield Problem(
            f"train.evaluate_every={config.train.evaluate_every} has no data.evaluation to ask",
            "train.evaluate_every=0 or data.evaluation=[SOURCE]",
        )
    yield from _check_asked(data.evaluation, list(data.sources))
    for key, weight in weights.items():
        parent, _, source = key.rpartition(".")
        if source not in data.sources:
            near = get_close_matches(source, data.sources) or list(data.sources) or ["SOURCE"]
            yield Problem(
                f"{key}={weight} names no source of data.sources",
                either([f"{parent}.{other}={weight}" for other in near]),
            )
        if not 0 < weight < inf:
            yield Problem(f"{key}={weight} must be above 0, and finite", f"{key}=1.0")
    for source in data.sources:
        most = data.sources[source].max_epochs
        if most is not None and not 0 < most <= MOST_EPOCHS:
            key = f"data.sources.{source}.max_epochs"
            yield Problem(
                f"{key}={most} must be above 0, and at most {MOST_EPOCHS:,}",
                f"{key}=null, as often as it takes",
            )
    if data.order is not None:
        yield from _check_order(config)
    if data.generate:
        if not data.root:
            yield Problem(
                "data.generate=true needs data.root to write to", "data.root=runs/sample_data"
            )
        return
    if not Path(data.tokenizer).is_dir():
        yield Problem(
            f"data.tokenizer={data.tokenizer} is no folder",
            "data.tokenizer=FOLDER, one that holds a Hugging Face tokenizer"
            + from_hub(data.tokenizer),
        )
    for source in data.sources:
        if source in read and not Path(data.sources[source].path).is_dir():
            yield Problem(
                f"data.sources.{source}.path={data.sources[source].path} is no folder",
                f"data.sources.{source}.path=FOLDER, one that launch/prepare.py wrote",
            )


def _check_asked(asked: list[str], sources: list[str]) -> Iterator[Problem]:
    """What is asked for answers exists, and is asked once."""
    given = f"data.evaluation={typed_list(asked)}"
    for source in asked:
        if source not in sources:
            near = get_close_matches(source, sources) or sources or ["SOURCE"]
            named = [f"data.evaluation=[{other}]" for other in near]
            yield Problem(f"{given} names {source}, no source of data.sources", either(named))
    if len(set(asked)) < len(asked):
        once = typed_list(list(dict.fromkeys(asked)))
        yield Problem(f"{given} names a source twice", f"data.evaluation={once}")


def _check_order(config: Config) -> Iterator[Problem]:
    """An order names every sample itself, so nothing else may decide which come."""
    data = config.data
    if not Path(data.order or "").is_file():
        yield Problem(
            f"data.order={data.order} is no file",
            "launch/prepare.py export-order, which writes one",
        )
    decided = [
        f"data.sources.{name}.max_epochs={data.sources[name].max_epochs}"
        for name in data.mixtures.get(config.stage.name, {})
        if name in data.sources and data.sources[name].max_epochs is not None
    ]
    if data.weigh_by is not WeighBy.samples:
        decided.append(f"data.weigh_by={data.weigh_by.name}")
    for word in decided:
        yield Problem(f"{word} says nothing beside data.order={data.order}", "one of the two")


def check_images(config: Config) -> Iterator[Problem]:
    """The largest image fits a pack: its tokens, start and end, and its patches.

    An image more oblong than most can come out larger than ``data.max_pixels``, as no side falls
    below one token; ``data.oversize`` says what becomes of it.
    """
    data, vision, seq_len = config.data, config.model.vision, config.train.seq_len
    pixels_per_token = (vision.patch_size * vision.spatial_merge_size) ** 2
    patches_per_token = vision.spatial_merge_size**2
    if data.max_pixels < pixels_per_token:
        yield Problem(
            f"data.max_pixels={data.max_pixels} must be at least one token: {pixels_per_token}",
            f"data.max_pixels={pixels_per_token}",
        )
        return
    if data.min_pixels > data.max_pixels:
        yield Problem(
            f"data.min_pixels={data.min_pixels} must be at most data.max_pixels={data.max_pixels}",
            f"data.min_pixels={pixels_per_token}",
        )
    num_tokens = data.max_pixels // pixels_per_token
    if seq_len < num_tokens + 2:
        fits = [f"train.seq_len={num_tokens + 2}"]
        if seq_len > 2:
            fits.insert(0, f"data.max_pixels={(seq_len - 2) * pixels_per_token}")
        yield Problem(
            f"train.seq_len={seq_len} must hold the {num_tokens} + 2 tokens of an image of"
            f" data.max_pixels={data.max_pixels}",
            either(fits),
        )
    if data.max_patches < num_tokens * patches_per_token:
        yield Problem(
            f"data.max_patches={data.max_patches} must hold the {num_tokens * patches_per_token}"
            f" patches of an image of data.max_pixels={data.max_pixels}",
            f"data.max_patches={num_tokens * patches_per_token}",
        )


def check_videos(config: Config) -> Iterator[Problem]:
    """Frames are at least one token each, and the limits in order.

    Most runs have no videos, so a pack need not hold the longest one: ``data.oversize`` says what
    becomes of a sample that fits none.
    """
    video, vision = config.data.video, config.model.vision
    pixels_per_token, depth = vision.resize_factor**2, vision.temporal_patch_size
    bounds = {
        "max_pixels": ("one token", pixels_per_token),
        "max_frames": ("data.video.min_frames and a patch", max(video.min_frames, depth)),
        "max_tokens": (
            f"the tokens of data.video.max_frames={video.max_frames} frames, {depth} in each",
            -(-video.max_frames // depth),
        ),
    }
    for name, (what, least) in bounds.items():
        if (value := getattr(video, name)) < least:
            key = f"data.video.{name}"
            yield Problem(f"{key}={value} must be at least {what}: {least}", f"{key}={least}")
    if video.min_pixels > video.max_pixels:
        yield Problem(
            f"data.video.min_pixels={video.min_pixels} must be at most"
            f" data.video.max_pixels={video.max_pixels}",
            f"data.video.min_pixels={pixels_per_token}",
        )

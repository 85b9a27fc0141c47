"""Samples of a dataset, or a pack of a run's plan, read as training reads them."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from triptych.configs.schema import Config
from triptych.data.batch import Batch, UnreadableSample
from triptych.data.dataset.dataset import Dataset
from triptych.data.loading.reader import BatchFormat, Reader
from triptych.data.tokenizer import Tokenizer, load_tokenizer
from triptych.data.types import Pack, PixelLimits, SampleId
from triptych.errors import DataError
from triptych.train.data import Mixture


@dataclass(frozen=True, slots=True)
class Chosen:
    """One batch, whose segments are the samples."""

    batch: Batch
    titles: list[str]
    """Of each segment: source and number of its sample."""
    unreadable: list[UnreadableSample]
    """Their pixels are zeros."""
    tokenizer: Tokenizer


def read_samples(folder: Path, numbers: Sequence[int], config: Config) -> Chosen:
    """Some samples of a dataset, one after the other.

    Raises:
        DataError: the folder is no dataset, is damaged, of another model or tokenizer, or has no
            such sample.
    """
    dataset = Dataset.open(folder, folder.name)
    dataset.check_tokens(config.model.tokens, load_tokenizer(config.data.tokenizer).fingerprint)
    if beyond := [number for number in numbers if number >= len(dataset)]:
        raise DataError(f"{folder} has samples 0 to {len(dataset) - 1}; there is no {beyond[0]}")
    sizes = dataset.sizes(PixelLimits.of(config.data), config.model.vision)
    pack = Pack(
        number=0,
        samples=tuple(SampleId(0, number) for number in numbers),
        num_tokens=int(sizes.num_tokens[list(numbers)].sum()),
        num_patches=int(sizes.num_patches[list(numbers)].sum()),
    )
    return read_whole([dataset], pack, config)


def read_pack(number: int, config: Config) -> Chosen:
    """A pack of the mixture of a stage, counted from 0; plans all before it.

    Raises:
        ConfigError: tokenizer or weights cannot be used.
        DataError: a dataset is missing, damaged, or of another tokenizer, or the plan has no such
            pack.
    """
    mixture = Mixture.open(config, config.data.mixtures[config.stage.name])
    packs = mixture.plan.first_packs(number + 1)
    if number >= len(packs):
        raise DataError(
            f"the plan ends with pack {len(packs) - 1}: data.order, or every source's max_epochs, "
            f"is used up; there is no pack {number}"
        )
    return read_whole(mixture.sources, packs[number], config)


def read_whole(sources: Sequence[Dataset], pack: Pack, config: Config) -> Chosen:
    """One pack, its pixels too; ``sources`` as its plan numbers them."""
    form = BatchFormat(
        model=config.model,
        limits=PixelLimits.of(config.data),
        pad_to=1,
        read_pixels=True,
        pin_memory=False,
    )
    with closing(Reader(sources, form, num_workers=config.data.num_workers)) as reader:
        step = reader.read([[pack]])
    titles = [f"{sources[i.source].name}, sample {i.index}" for i in pack.samples]
    tokenizer = load_tokenizer(config.data.tokenizer)
    return Chosen(step.microbatches[0], titles, step.unreadable, tokenizer)

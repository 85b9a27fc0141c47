"""The datasets of a run: opened, checked against tokenizer and model, planned, and read."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from triptych.configs.schema import Config, WeighBy
from triptych.costs.compute import compute_of_pack
from triptych.costs.microbatch_order import pipeline_order
from triptych.data.batch import Step
from triptych.data.dataset.dataset import SIZES, Dataset
from triptych.data.digits.make import have_digits, make_digits
from triptych.data.loading.loader import Loader, validation_step
from triptych.data.loading.reader import BatchFormat, Reader
from triptych.data.media.cache import FrameCache
from triptych.data.plan.given_order import GivenOrder
from triptych.data.plan.order import Cursor, Plan
from triptych.data.plan.passes import remember_in
from triptych.data.plan.plan_sources import plan_sources
from triptych.data.stores.media_store import open_store
from triptych.data.tokenizer import load_tokenizer
from triptych.data.types import Pack, PixelLimits, SampleId
from triptych.errors import ConfigError, DataError
from triptych.parallel.mesh import Mesh
from triptych.train.console import say


@dataclass(frozen=True, slots=True)
class Mixture:
    """Datasets in the order in which their plan numbers them."""

    sources: list[Dataset]
    plan: Plan

    @classmethod
    def open(cls, config: Config, weights: Mapping[str, float], *, once: bool = False) -> "Mixture":
        """Open and plan the datasets that have a weight.

        Args:
            config: of the run.
            weights: source name -> weight.
            once: a window holds no sample twice, however few there are, no source ends, and weights
                are shares of samples: for validation.

        Raises:
            ConfigError: tokenizer or weights cannot be used.
            DataError: a dataset is missing, damaged, empty, or of another tokenizer; or the order
                that was brought does not fit them.
        """
        tokenizer = load_tokenizer(config.data.tokenizer)
        if tokenizer.vocab_size > config.model.language.vocab_size:
            raise ConfigError(
                f"data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} tokens, more "
                f"than model.language.vocab_size={config.model.language.vocab_size}"
                "  -> take the tokenizer that the model was made with"
            )
        sources = [open_source(config, name) for name in weights]
        for source in sources:
            source.check_tokens(config.model.tokens, tokenizer.fingerprint)
        num_samples = sum(len(source) for source in sources)
        limits = {name: config.data.sources[name].max_epochs for name in weights}
        file = None if once or config.data.order is None else Path(config.data.order)
        make_plan = Plan if file is None else partial(GivenOrder, file)
        plan = make_plan(
            sources=plan_sources(
                sources,
                weights,
                PixelLimits.of(config.data),
                config.model.vision,
                {} if once else limits,
            ),
            seed=config.seed,
            seq_len=config.train.seq_len,
            max_patches=config.data.max_patches,
            window=min(config.data.window, num_samples) if once else config.data.window,
            oversize=config.data.oversize,
            weigh_by=WeighBy.samples if once else config.data.weigh_by,
            remember=remember_in([*(source.path / SIZES for source in sources), _fallback(config)]),
        )
        return cls(sources, plan)

    def loader(self, config: Config, mesh: Mesh, cursor: Cursor) -> Loader:
        """This rank's steps from ``cursor`` on; whoever asks must close it."""
        return Loader(
            self.plan,
            self.sources,
            cursor,
            batch_format(config, mesh),
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dims.dp,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            cost=compute_of_pack(config),
            num_workers=config.data.num_workers,
            prefetch_steps=config.data.prefetch_steps,
            order=pipeline_order(config),
        )

    def one_by_one(self, config: Config, mesh: Mesh, samples: Sequence[SampleId]) -> Step:
        """A step of which each sample is a microbatch of its own.

        The last one comes again, to fill up a whole number of rounds of an interleaved pipeline.
        """
        sizes = [source.sizes for source in self.plan.sources]
        packs = [
            Pack(
                number,
                (sample,),
                int(sizes[sample.source].num_tokens[sample.index]),
                int(sizes[sample.source].num_patches[sample.index]),
            )
            for number, sample in enumerate(samples)
        ]
        round_to = mesh.dims.pp if config.parallel.vpp > 1 else 1
        packs += [packs[-1]] * (-len(packs) % round_to)
        reader = Reader(
            self.sources, batch_format(config, mesh), num_workers=config.data.num_workers
        )
        with closing(reader):
            return reader.read([[pack] for pack in packs])

    def validation_step(self, config: Config, mesh: Mesh) -> Step:
        """This rank's share of the ``train.validation_packs`` first packs."""
        return validation_step(
            self.plan,
            self.sources,
            batch_format(config, mesh),
            num_packs=config.train.validation_packs,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dims.dp,
            micro_batch_size=config.train.micro_batch_size,
            num_workers=config.data.num_workers,
            round_to=mesh.dims.pp if config.parallel.vpp > 1 else 1,
        )

    def __str__(self) -> str:
        listed = ", ".join(
            f"{source.name} {source.weight:g} of {len(source):,} samples"
            + _too_long(len(source) - num_fitting)
            + ("" if source.max_epochs is None else f" at most {source.max_epochs:g} times")
            for source, num_fitting in zip(self.plan.sources, self.plan.num_fitting, strict=True)
        )
        return f"{listed}; plan {self.plan.hash[:12]}"


def open_source(config: Config, name: str) -> Dataset:
    """A dataset of ``data.sources``.

    Raises:
        DataError: it is missing or damaged.
    """
    source = config.data.sources[name]
    store = open_store(source.shards, config.data.requests_per_s) if source.shards else None
    return Dataset.open(source.path, name, _fallback(config), store)


def _fallback(config: Config) -> Path:
    """Where counts are kept of a dataset whose folder cannot be written to."""
    return Path(config.run.dir) / SIZES


def generate_samples(config: Config, mesh: Mesh) -> None:
    """Make the sample datasets, where asked for and not there. Every rank must call this.

    Raises:
        DataError: they are there, but not all.
    """
    root = Path(config.data.root)
    if config.data.generate and mesh.is_main and not have_digits(root):
        say(f"making sample data in {root}")
        make_digits(root)
    dist.barrier()
    paths = [Path(source.path) for source in config.data.sources.values()]
    lacking = [path.name for path in paths if path.parent == root and not path.exists()]
    if config.data.generate and lacking:
        raise DataError(
            f"{root} was made by an earlier version: it has no {', '.join(lacking)}"
            "  -> remove it, and it is made again"
        )


def _too_long(count: int) -> str:
    """How many samples of a source fit no pack, where there are any; they are left out whole."""
    return f" ({count:,} too long for a pack, skipped)" if count else ""


def batch_format(config: Config, mesh: Mesh) -> BatchFormat:
    """How this rank reads samples."""
    cache = config.data.cache
    max_bytes = int(cache.max_gb * 1e9)
    return BatchFormat(
        model=config.model,
        limits=PixelLimits.of(config.data),
        pad_to=config.parallel.tp,
        read_pixels=mesh.reads_media,
        pin_memory=mesh.device.type == "cuda",
        cache=None if cache.folder is None else FrameCache(Path(cache.folder), max_bytes),
    )

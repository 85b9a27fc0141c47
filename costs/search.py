"""The best layouts of a run for the devices it has: what fits their memory, fastest first."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from triptych.configs.rules.parallel import (
    check_batch,
    check_interleaving,
    check_layout,
    check_parallel,
)
from triptych.configs.schema import Config, Recompute
from triptych.costs.activation_memory import GPU, Activations
from triptych.costs.estimate import (
    Estimate,
    StepShape,
    estimate,
    pass_seconds,
    replica_exchange,
    usable_bytes,
)
from triptych.costs.layer_split import layers_per_chunk
from triptych.costs.memory import pp_stage_memory
from triptych.costs.parameter_shards import pp_stage_shards

DEGREES = (1, 2, 4, 8, 16)
"""Degrees of tp, within a node, and of pp."""
CHUNKS = (1, 2, 4)
MICRO_BATCH_SIZES = (1, 2, 4)
RECOMPUTE = (Recompute.none, Recompute.selective, Recompute.full)
"""What the language model recomputes, from fast to small."""
MODULES = ["mlp"]
"""What is recomputed selectively: flash attention leaves core_attn nothing to save."""


def best_layouts(config: Config, *, count: int) -> list[Estimate]:
    """The ``count`` layouts with the highest MFU, best first.

    All that fit are ranked by a closed form of their pipeline; only the first ones are simulated.
    Sequence parallelism is on wherever tp is above 1: it saves memory, and the time that norms and
    residuals take, which is not in the model.
    """
    fitting = sorted(_fitting(config), key=lambda found: found[0])
    simulated = [estimate(candidate) for _, candidate in fitting[:count]]
    return sorted(simulated, key=lambda found: found.mfu, reverse=True)


def _fitting(config: Config) -> Iterator[tuple[float, Config]]:
    """Seconds per step by the closed form; of each layout, with as little recomputation as fits."""
    overlap = config.parallel.overlap
    for tp, pp, vpp, packs in product(DEGREES, DEGREES, CHUNKS, MICRO_BATCH_SIZES):
        shaped = replace(
            config,
            parallel=replace(
                config.parallel,
                tp=tp,
                pp=pp,
                vpp=vpp,
                sequence_parallel=tp > 1,
                layout="auto",
                overlap=replace(overlap, p2p=False, tp_comm=overlap.tp_comm and tp > 1),
            ),
            train=replace(config.train, micro_batch_size=packs),
        )
        if not _runs(shaped):
            continue
        for candidate in _recomputing(shaped):
            seconds = _seconds_if_it_fits(candidate)
            if seconds is not None:
                yield seconds, candidate
                break


def _runs(config: Config) -> bool:
    """Whether the ranks, layers and packs divide, and tp stays within a node."""
    gpus, per_node = config.cluster.gpus, config.cluster.gpus_per_node
    assert gpus is not None
    assert per_node is not None
    rules = (
        check_parallel(config, gpus),
        check_interleaving(config),
        check_layout(config),
        check_batch(config, gpus),
    )
    return config.parallel.tp <= per_node and not any(True for rule in rules for _ in rule)


def _recomputing(config: Config) -> Iterator[Config]:
    """The layout with more and more recomputation."""
    vit = (Recompute.none, Recompute.full) if config.stage.vit.train else (Recompute.none,)
    for llm, tower in product(RECOMPUTE, vit):
        recompute = replace(config.parallel.recompute, llm=llm, modules=MODULES, vit=tower)
        yield replace(config, parallel=replace(config.parallel, recompute=recompute))


def _seconds_if_it_fits(config: Config) -> float | None:
    """Seconds of a step: the slowest stage's passes, and its share of filling the pipeline."""
    shape, layers = StepShape.of(config), layers_per_chunk(config)
    shards = pp_stage_shards(config, layers)
    memory = pp_stage_memory(
        Activations(config, shape.load, GPU),
        layers,
        shards,
        dp=shape.dp,
        num_microbatches=shape.num_microbatches,
    )
    if max(stage.total for stage in memory) > usable_bytes(config):
        return None
    seconds = pass_seconds(config, shape, layers)
    pp, vpp = config.parallel.pp, config.parallel.vpp
    chunks = [f + b for f, b in zip(seconds.forward, seconds.backward, strict=True)]
    stages = [sum(chunks[stage::pp]) for stage in range(pp)]
    waiting = (pp - 1) / pp * sum(stages) / vpp
    exchange = replica_exchange(config, shape, shards, seconds)
    return shape.num_microbatches * max(stages) + waiting + exchange.exposed_s

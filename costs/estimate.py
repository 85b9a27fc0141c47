"""What a run will be like: memory, time of a step, utilisation, days. Arithmetic, no torch.

Not in it: the optimizer's update, reading data, checkpoints, and ranks that wait for slower ones.
So a speed is the upper end of a range (``Estimate.least_share``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triptych.configs.schema import Config
from triptych.costs.activation_memory import GPU, Activations, SavedActivations
from triptych.costs.communication import (
    Communication,
    Links,
    gradient_communication,
    part_duration,
    pp_message,
    tensor_communication,
    weight_communication,
)
from triptych.costs.compute import expected_load
from triptych.costs.flops import Workload, stage_flops
from triptych.costs.layer_split import layers_per_chunk
from triptych.costs.memory import PPStageMemory, pp_stage_memory
from triptych.costs.parameter_shards import ParameterShards, pp_stage_shards, trained
from triptych.costs.pipeline_schedule import Timeline, ideal_bubble, simulate

DAY_S = 86400
TERA = 1e12
LEFT_OUT = 0.1
"""Share of a step that all that is left out may take: our judgement, as nothing is measured."""
GUESSED_TOO_FAST = 0.15
"""By how much guessed efficiencies may overstate the speed: so, too."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """How a step divides."""

    dp: int
    num_microbatches: int
    load: Workload
    """What a microbatch holds."""

    @classmethod
    def of(cls, config: Config) -> "StepShape":
        """The shape of a step on ``cluster.gpus`` devices; validated before."""
        assert config.cluster.gpus is not None
        dp = config.cluster.gpus // (config.parallel.tp * config.parallel.pp)
        packs = config.train.micro_batch_size * dp
        return cls(dp, config.train.global_batch_size // packs, expected_load(config))


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of each pass, by chunk, as pp stages take them; waiting for tp included."""

    forward: Sequence[float]
    backward: Sequence[float]
    p2p: float
    """A message between stages."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one rank sends in a step, at most over the stages, and for how long it waits."""

    bytes_sent: float
    exposed_s: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """One run on one cluster."""

    config: Config
    shape: StepShape
    layers: tuple[int, ...]
    """Decoder layers of each chunk."""
    shards: Sequence[ParameterShards]
    """Parameters on one rank of each stage."""
    activations: Sequence[SavedActivations]
    """What one microbatch keeps in each chunk."""
    memory: Sequence[PPStageMemory]
    timeline: Timeline
    tp: Exchange
    pp: Exchange
    dp: Exchange

    @property
    def gpus(self) -> int:
        """All devices."""
        return self.shape.dp * self.config.parallel.tp * self.config.parallel.pp

    @property
    def step_s(self) -> float:
        """Seconds of a step: the pipeline, then what is left to exchange between replicas."""
        return self.timeline.makespan_s + self.dp.exposed_s

    @property
    def ideal_bubble(self) -> float:
        """If every chunk cost the same and messages took no time."""
        parallel = self.config.parallel
        return ideal_bubble(
            pp=parallel.pp, num_microbatches=self.shape.num_microbatches, vpp=parallel.vpp
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step whose packs are full."""
        return self.config.train.global_batch_size * self.config.train.seq_len

    @property
    def tokens_per_day(self) -> float:
        """LLM tokens, text and vision."""
        return self.tokens_per_step / self.step_s * DAY_S

    @property
    def days(self) -> float:
        """Days that the stage's token budget takes."""
        return self.config.stage.token_budget / self.tokens_per_day

    @property
    def flops_per_token(self) -> tuple[float, float]:
        """Model FLOPs per LLM token: ViT with merger, language model."""
        load = self.shape.load
        model, stage = self.config.model, self.config.stage
        images = Workload(0, 0, load.num_patches, load.patch_pairs, num_supervised_tokens=0)
        vision, everything = stage_flops(model, stage, images), stage_flops(model, stage, load)
        return vision / load.num_tokens, (everything - vision) / load.num_tokens

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: recomputation does not count."""
        peak = self.config.cluster.peak_tflops
        assert peak is not None
        return self.tflops_per_gpu / peak

    @property
    def tflops_per_gpu(self) -> float:
        """Model TFLOP/s of one device; recomputation does not count."""
        return sum(self.flops_per_token) * self.tokens_per_step / self.step_s / self.gpus / TERA

    @property
    def least_share(self) -> float:
        """The share of the estimated speed that a run should reach at least."""
        is_guessed = "efficiency" not in self.config.cluster.measured
        return (1 - LEFT_OUT) * (1 - GUESSED_TOO_FAST * is_guessed)

    @property
    def fits(self) -> bool:
        """Whether every stage fits its devices."""
        return max(stage.total for stage in self.memory) <= usable_bytes(self.config)


def estimate(config: Config) -> Estimate:
    """The whole of it. The cluster must be described (``check_cluster``)."""
    shape, layers = StepShape.of(config), layers_per_chunk(config)
    shards = pp_stage_shards(config, layers)
    activations = Activations(config, shape.load, GPU)
    pp, vpp, microbatches = config.parallel.pp, config.parallel.vpp, shape.num_microbatches
    links = _links(config, shape)
    seconds = pass_seconds(config, shape, layers)
    timeline = simulate(
        np.reshape(seconds.forward, (vpp, pp)),
        np.reshape(seconds.backward, (vpp, pp)),
        num_microbatches=microbatches,
        p2p_s=seconds.p2p,
    )
    message = pp_message(config, shape.load)
    hops = 2 * vpp * microbatches if pp > 1 else 0
    return Estimate(
        config=config,
        shape=shape,
        layers=layers,
        shards=shards,
        activations=activations.of_chunks(layers),
        memory=pp_stage_memory(
            activations, layers, shards, dp=shape.dp, num_microbatches=microbatches
        ),
        timeline=timeline,
        tp=_tensor_exchange(config, shape, layers, links),
        pp=Exchange(message.bytes_sent * hops, links.pp.seconds(message) * hops),
        dp=replica_exchange(config, shape, shards, seconds),
    )


def usable_bytes(config: Config) -> float:
    """Bytes of one device's memory that a run can have."""
    cluster = config.cluster
    assert cluster.memory_gib is not None
    assert cluster.reserved_gib is not None
    return (cluster.memory_gib - cluster.reserved_gib) * 2**30


def pass_seconds(config: Config, shape: StepShape, layers: tuple[int, ...]) -> Seconds:
    """How long each chunk takes for a microbatch: computing, and waiting for its tp ranks."""
    assert config.cluster.peak_tflops is not None
    rate = config.cluster.peak_tflops * TERA
    links = _links(config, shape)
    chunks = part_duration(config, shape.load).of_chunks(layers)
    return Seconds(
        forward=[chunk.forward / rate for chunk in chunks],
        backward=[chunk.backward / rate for chunk in chunks],
        p2p=links.pp.seconds(pp_message(config, shape.load)) if config.parallel.pp > 1 else 0.0,
    )


def replica_exchange(
    config: Config, shape: StepShape, shards: Sequence[ParameterShards], seconds: Seconds
) -> Exchange:
    """Gradients and weights over dp, and a tied embedding's gradient between first and last stage.

    With overlap, gradients travel beside the last backward pass and weights beside the first
    forward pass of a stage.
    """
    links, overlap = _links(config, shape), config.parallel.overlap
    pp, vpp = config.parallel.pp, config.parallel.vpp
    exchanges = []
    for stage, held in enumerate(shards):
        training = trained(config, held)
        gradients = gradient_communication(config, training, dp=shape.dp)
        weights = weight_communication(config, training, dp=shape.dp)
        beside_backward = sum(seconds.backward[stage::pp]) / vpp if overlap.grad_reduce else 0.0
        beside_forward = sum(seconds.forward[stage::pp]) / vpp if overlap.param_gather else 0.0
        exposed_s = max(0.0, links.dp.seconds(gradients) - beside_backward)
        exposed_s += max(0.0, links.dp.seconds(weights) - beside_forward)
        exchanges.append(Exchange(gradients.bytes_sent + weights.bytes_sent, exposed_s))
    tied = _tied_communication(config)
    return Exchange(
        max(exchange.bytes_sent for exchange in exchanges) + tied.bytes_sent,
        max(exchange.exposed_s for exchange in exchanges) + links.pp.seconds(tied),
    )


def _tensor_exchange(
    config: Config, shape: StepShape, layers: tuple[int, ...], links: Links
) -> Exchange:
    """What the pp stage that waits longest exchanges."""
    chunks = tensor_communication(config, shape.load).of_chunks(layers)
    stages = []
    for stage in range(config.parallel.pp):
        own = chunks[stage :: config.parallel.pp]
        total = sum((c.forward + c.backward for c in own), Communication()) * shape.num_microbatches
        stages.append(Exchange(total.bytes_sent, links.tp.seconds(total)))
    return max(stages, key=lambda stage: stage.exposed_s)


def _tied_communication(config: Config) -> Communication:
    """The gradient of a tied embedding, in fp32, summed over two stages."""
    language = config.model.language
    if not language.tie_word_embeddings or config.parallel.pp == 1 or not config.stage.llm.train:
        return Communication()
    size = language.vocab_size * language.hidden_size // config.parallel.tp * 4
    return Communication(size, size, 1)


def _links(config: Config, shape: StepShape) -> Links:
    parallel = config.parallel
    return Links.of(config.cluster, tp=parallel.tp, pp=parallel.pp, dp=shape.dp)

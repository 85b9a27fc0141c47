"""Bytes that a pipeline stage holds on one rank, at its fullest."""

from collections.abc import Sequence
from dataclasses import dataclass

from triptych.configs.schema import Config, Precision, Recompute, Zero
from triptych.costs.activation_memory import Activations
from triptych.costs.communication import pp_message
from triptych.costs.element_sizes import FP32, activation_bytes
from triptych.costs.parameter_shards import ParameterShards, trained
from triptych.costs.pipeline_schedule import pp_stage_passes

CHUNK_TOKENS = 1024
"""Tokens whose logits exist together. Enough for matrix products at full speed; 6 bytes per logit
in bf16, so 0.9 GB with a vocabulary of 152k on one rank, against 7.5 GB for 8192 tokens."""


@dataclass(frozen=True, slots=True)
class PPStageMemory:
    """Bytes on one rank of a pipeline stage, at its fullest."""

    weights: int
    gradients: int
    """Gradients of what trains, fp32."""
    optimizer: int
    """State of what trains, sharded over dp: ``bytes_of_state`` for each parameter."""
    activations: int
    """All microbatches between forward and backward pass; interleaved, with their outputs."""
    working: int
    """While a layer or the head computes."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def pp_stage_memory(
    activations: Activations,
    layers: Sequence[int],
    shards: Sequence[ParameterShards],
    *,
    dp: int,
    num_microbatches: int,
) -> list[PPStageMemory]:
    """The bytes that each pp stage holds.

    Args:
        activations: of a microbatch.
        layers: decoder layers of each chunk, as ``layers_per_chunk`` gives them.
        shards: of each stage, as ``pp_stage_shards`` gives them.
        dp: data-parallel degree.
        num_microbatches: of a step, on one data-parallel rank.
    """
    config = activations.config
    pp, vpp = config.parallel.pp, config.parallel.vpp
    saved = [chunk.total for chunk in activations.of_chunks(layers)]
    if vpp > 1:  # megatron-core keeps what was sent until it comes back
        message = int(pp_message(config, activations.load).bytes_sent)
        saved = [*(size + message for size in saved[:-1]), saved[-1]]
    stages = []
    for stage, held in enumerate(shards):
        training = trained(config, held)
        everything = sum(shard.total for shard in held.values())
        stages.append(
            PPStageMemory(
                weights=everything * activation_bytes(config),
                gradients=training * FP32,
                optimizer=-(-training // dp) * bytes_of_state(config),
                activations=most_saved(
                    saved[stage::pp], stage, pp=pp, vpp=vpp, num_microbatches=num_microbatches
                ),
                working=_working(activations, is_first=stage == 0, is_last=stage == pp - 1),
            )
        )
    return stages


def bytes_of_state(config: Config) -> int:
    """Per parameter that trains, before sharding: fp32 masters and two moments.

    megatron-core's fp32 weights are their own masters. DeepSpeed also keeps a rank's share of the
    reduced gradients.
    """
    if config.optimizer.zero is Zero.deepspeed:
        return 4 * FP32
    return (3 if config.train.precision is Precision.bf16 else 2) * FP32


def most_saved(
    saved: Sequence[int], stage: int, *, pp: int, vpp: int, num_microbatches: int
) -> int:
    """The most bytes that a stage keeps at a time, going through its passes in order.

    In plain 1F1B that is min(pp - stage, num_microbatches) microbatches. Passes repeat themselves
    every pp microbatches, and warm-up is shorter than two such groups, so three show the most.

    Args:
        saved: bytes of a microbatch in each chunk of the stage.
        stage: which one.
        pp: stages.
        vpp: chunks per stage.
        num_microbatches: of a step.
    """
    now = most = 0
    enough = min(num_microbatches, 3 * pp)
    for done in pp_stage_passes(stage, pp=pp, vpp=vpp, num_microbatches=enough):
        now += -saved[done.chunk] if done.is_backward else saved[done.chunk]
        most = max(most, now)
    return most


def _working(activations: Activations, *, is_first: bool, is_last: bool) -> int:
    """What the hungriest of decoder layer, ViT layer and head needs while it computes.

    A layer's backward pass holds the gradients of its MLP, that of its output and of its input, and
    what it recomputes. The head holds its hidden states, the gradient of its weight in fp32, and
    one chunk of logits in both dtypes.
    """
    config, load = activations.config, activations.load
    vision, language, tp = config.model.vision, config.model.language, config.parallel.tp
    b = activation_bytes(config)
    mlp = 3 * language.intermediate_size // tp
    layer = load.num_tokens * (mlp + 2 * language.hidden_size) * b + activations.recomputed()
    vit_mlp = (vision.fc1_size + vision.intermediate_size) // tp
    vit = load.num_patches * (vit_mlp + 2 * vision.hidden_size) * b
    if config.parallel.recompute.vit is Recompute.full:
        vit += activations.vit_layer()
    vocabulary = language.vocab_size // tp
    head = load.num_tokens * language.hidden_size * b + CHUNK_TOKENS * vocabulary * (b + FP32)
    head += vocabulary * language.hidden_size * FP32 * config.stage.llm.train
    return max(layer, vit if is_first and config.stage.vit.train else 0, head if is_last else 0)

"""What a rank computes in the forward and the backward pass of each part of the model.

Unlike the model FLOPs of ``flops.py``, this is what the device has to do, in the time it takes:
recomputation counts, what tp replicates counts in full, and each kind of product is weighed by how
close it comes to the peak (``cluster.efficiency``). The unit is one FLOP at peak rate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triptych.configs.schema import Config, Recompute, RecomputeConfig
from triptych.costs.flops import (
    PartFlops,
    Workload,
    adapter_flops,
    head_flops,
    layer_flops,
    mlp_flops,
    vit_flops,
)

EXPECTED_SEGMENTS = 4
"""In a pack, where nothing is known of its samples: decides what attention costs. Ours."""


@dataclass(frozen=True, slots=True)
class PassCompute:
    """What one microbatch costs a rank of ``tp_group``, in FLOPs at peak rate."""

    forward: float = 0.0
    backward: float = 0.0
    """Recomputation included."""

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward

    def __add__(self, other: "PassCompute") -> "PassCompute":
        return PassCompute(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, count: int) -> "PassCompute":
        return PassCompute(self.forward * count, self.backward * count)


@dataclass(frozen=True, slots=True)
class PartCompute:
    """The parts that a split over pipeline stages tells apart."""

    vision: PassCompute
    """ViT and merger."""
    layer: PassCompute
    """One decoder layer."""
    head: PassCompute

    def of_chunks(self, layers: Sequence[int]) -> list[PassCompute]:
        """What each model chunk computes; the ViT is in the first one, the head in the last."""
        chunks = [self.layer * count for count in layers]
        chunks[0] += self.vision
        chunks[-1] += self.head
        return chunks


def part_compute(config: Config, load: Workload) -> PartCompute:
    """What a microbatch takes of each part, under the stage's frozen parts and recomputation."""
    model, stage, recompute = config.model, config.stage, config.parallel.recompute
    vit, adapter, llm = stage.vit.train, stage.adapter.train, stage.llm.train
    rates, tp = config.cluster.efficiency, config.parallel.tp
    vision = _weigh(vit_flops(model.vision, load), rates.vit * tp, rates.vit * tp)
    merger = _weigh(adapter_flops(model, load), rates.vit, rates.vit)  # replicated over tp
    layer = _weigh(layer_flops(model.language, load), rates.linear * tp, rates.attention * tp)
    mlp = _weigh(mlp_flops(model.language, load), rates.linear * tp, rates.attention * tp)
    head = _weigh(head_flops(model, load), rates.head * tp, rates.head * tp)
    again = vision.total if recompute.vit is Recompute.full else 0.0
    reaches_llm = vit or adapter or llm
    return PartCompute(
        vision=_passes(vision, trains=vit, gradient=vit, recomputed=again)
        + _passes(merger, trains=adapter, gradient=vit or adapter),
        layer=_passes(
            layer,
            trains=llm,
            gradient=reaches_llm,
            recomputed=_recomputed(recompute, layer, mlp),
        ),
        # The loss computes its gradients on the way (models/loss.py).
        head=PassCompute(forward=_passes(head, trains=llm, gradient=reaches_llm).total),
    )


def compute_of_pack(config: Config) -> Callable[[Workload], float]:
    """A quick function from a pack to what the whole model computes for it, in both passes.

    That is linear in what is counted, so four loads of one thing each say all.
    """

    def total(load: Workload) -> float:
        parts = part_compute(config, load)
        return (parts.vision + parts.layer * config.model.language.num_layers + parts.head).total

    of_token, of_token_pair = total(Workload(1, 0, 0, 0)), total(Workload(0, 1, 0, 0))
    of_patch, of_patch_pair = total(Workload(0, 0, 1, 0)), total(Workload(0, 0, 0, 1))

    def cost(load: Workload) -> float:
        return (
            of_token * load.num_tokens
            + of_token_pair * load.token_pairs
            + of_patch * load.num_patches
            + of_patch_pair * load.patch_pairs
        )

    return cost


def expected_load(config: Config) -> Workload:
    """A full microbatch, as ``data.vision_share`` and ``data.image_patches`` expect it."""
    num_tokens = config.train.micro_batch_size * config.train.seq_len
    merge = config.model.vision.spatial_merge_size
    num_patches = int(num_tokens * config.data.vision_share) * merge**2
    return Workload(
        num_tokens=num_tokens,
        token_pairs=num_tokens * config.train.seq_len // EXPECTED_SEGMENTS,
        num_patches=num_patches,
        patch_pairs=num_patches * config.data.image_patches,
    )


def _weigh(flops: PartFlops, linear_rate: float, attention_rate: float) -> PartFlops:
    return PartFlops(flops.linear / linear_rate, flops.attention / attention_rate)


def _passes(
    part: PartFlops, *, trains: bool, gradient: bool, recomputed: float = 0.0
) -> PassCompute:
    backward = part.training(trains=trains, gradient=gradient) - part.total
    return PassCompute(part.total, backward + (recomputed if gradient else 0.0))


def _recomputed(recompute: RecomputeConfig, layer: PartFlops, mlp: PartFlops) -> float:
    """What the backward pass of a decoder layer computes again."""
    if recompute.llm is Recompute.none:
        return 0.0
    if recompute.llm is Recompute.full:
        return layer.total
    modules = {"core_attn": layer.attention, "mlp": mlp.linear}
    return sum(modules[name] for name in recompute.modules)

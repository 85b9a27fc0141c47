"""A few steps of a small model in any layout, and how far what they give is from one process.

Weights are drawn by global name, so they are the same in every layout, with no zero and no symmetry
among them; the packs of a global batch are fixed, and cut over the data-parallel ranks.

    python -m triptych.tests.helpers.layouts  # prints a new COVER for test_layouts.py
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triptych.configs.model_schema import ModelConfig, VisionConfig
from triptych.configs.schema import (
    Config,
    OptimizerConfig,
    OverlapConfig,
    ParallelConfig,
    PartConfig,
    Precision,
    Recompute,
    RecomputeConfig,
    StageConfig,
    TrainConfig,
    Zero,
)
from triptych.data.batch import Batch, Step
from triptych.data.loading.collate import Segment, collate
from triptych.data.types import SampleId
from triptych.models.init import EMBEDDING, HEAD
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.sharding import TensorSharding, full_shape, shard, unshard
from triptych.parallel.mesh import Mesh, build_mesh
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.reference import TOKENS, TOWERS, conversation, small_model
from triptych.tests.helpers.whole_state import whole_state
from triptych.train.engine import Engine, build_engine
from triptych.train.step import count, microbatch_losses, train_step

SEQ_LEN = 128
NUM_PACKS = 8
LR = 1e-3
CLIP_GRAD = 0.5
"""A tenth of the gradient norm, so that every step is clipped."""
EPS = 1e-5
"""Of Adam. At the usual 1e-8, rounding decides how far an element moves whose gradient is 0."""

TRAINED = {
    "stage1": ("vit", "adapter"),
    "stage1-vit": ("vit",),
    "stage2": ("vit", "adapter", "llm"),
    "stage3": ("adapter", "llm"),
    "warmup": ("llm",),
}
PACKS_WITH_IMAGES = {
    "some": (0, 3, 4, 6),
    "first": (0,),
    "none": (),
    "not last": (0, 1, 2, 3, 4, 5, 6),
}
"""Kind of global batch -> packs that show images. "first": only dp rank 0, in one microbatch;
"not last": pack 7, the last microbatch of the last rank, shows none."""
KINDS = ("some", "first", "none")
"""What every layout is measured with."""


@dataclass(frozen=True, order=True)
class Layout:
    """How ranks and layers are laid out."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    layers: tuple[int, ...] = (4,)
    vpp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        layers = f"[{','.join(map(str, self.layers))}]" if self.pp > 1 else ""
        tp = f"tp{self.tp}{'+sp' if self.sequence_parallel else ''}"
        vpp = f"x{self.vpp}" if self.vpp > 1 else ""
        return f"{tp} pp{self.pp}{vpp}{layers} dp{self.dp}"


@dataclass(frozen=True, order=True)
class LayoutCase:
    """What is trained, and how."""

    layout: Layout
    stage: str = "stage2"
    tied: bool = False
    micro_batch_size: int = 1
    vit: str = "none"
    """Recomputation."""
    llm: str = "none"
    """Recomputation: none, full, or the modules."""
    zero: str = "megatron"
    """The optimizer, and what it overlaps: megatron, megatron+grads, megatron+all or deepspeed.
    With all but the first, sequence-parallel layers overlap what they exchange."""
    precision: str = "fp32"
    tower: str = "plain"
    """The kind of ViT."""

    def __str__(self) -> str:
        head = "tied" if self.tied else "untied"
        how = f"vit {self.vit}, llm {self.llm}, {self.zero}"
        dtype = "" if self.precision == "fp32" else f" {self.precision}"
        tower = "" if self.tower == "plain" else f" {self.tower}"
        return f"{self.layout} {self.stage} {head} mbs{self.micro_batch_size} {how}{dtype}{tower}"


@dataclass(frozen=True)
class RankOutcome:
    """What one rank has of the outcome."""

    tp_rank: int
    pp_rank: int
    dp_rank: int
    loss_sums: dict[str, float]
    """By kind of global batch."""
    num_supervised_tokens: dict[str, int]
    norms: dict[str, float]
    grads: dict[str, dict[str, Tensor]]
    parameters: dict[str, Tensor]
    """After the steps, if there were any."""
    trained: set[str]
    with_gradient: set[str]
    with_state: set[str]


@dataclass(frozen=True)
class LayoutOutcome:
    """What is compared, of the whole model. Replicas lie along a new first dimension."""

    losses: dict[str, float]
    norms: dict[str, float]
    grads: dict[str, dict[str, Tensor]]
    parameters: dict[str, Tensor]


@dataclass(frozen=True)
class LayoutDistance:
    """The worst of each kind, over all global batches."""

    loss: float
    """Relative."""
    norm: float
    """Relative."""
    grads: float
    """Largest difference / largest element, of any tensor."""
    parameters: float
    """Largest difference after the steps, in learning rates."""
    worst: str = ""

    def times(self, bar: "LayoutDistance") -> float:
        """The worst of all, as a multiple of its bar."""
        names = [field.name for field in fields(self) if field.name != "worst"]
        return max(getattr(self, name) / getattr(bar, name) for name in names)

    def __or__(self, other: "LayoutDistance") -> "LayoutDistance":
        numbers = (max(a, b) for a, b in zip(_numbers(self), _numbers(other), strict=True))
        return LayoutDistance(*numbers, self.worst if self.grads >= other.grads else other.worst)

    def __str__(self) -> str:
        return " ".join(f"{number:8.1e}" for number in _numbers(self)) + f"  {self.worst}"


def _numbers(distance: LayoutDistance) -> tuple[float, ...]:
    return distance.loss, distance.norm, distance.grads, distance.parameters


def measure(
    layout: Layout,
    cases: Sequence[LayoutCase],
    num_steps: int = 0,
    kinds: Sequence[str] | None = None,
) -> list[RankOutcome]:
    """Run cases of one layout.

    Each gives the gradients of some kinds of global batch, those of ``telling_kinds`` unless they
    are given, then makes ``num_steps`` steps of all kinds in turn. Every rank must call this.
    """
    mesh, kinds = mesh_of(layout), kinds or telling_kinds(layout)
    return [_measure(case, mesh, num_steps, kinds) for case in cases]


def telling_kinds(layout: Layout) -> Sequence[str]:
    """The kinds of global batch in which this layout may be wrong by itself.

    Which rank sees the only image matters where packs are shared out. One dp rank reads all of
    them, and "some" already has microbatches with images before and after some without.
    """
    return KINDS if layout.dp > 1 else ("some", "none")


def mesh_of(layout: Layout) -> Mesh:
    """Its groups. Every rank must call this."""
    return build_mesh(layout.tp, layout.pp, vpp=layout.vpp, seed=0, timeout_s=HANG_S)


def engine_of(case: LayoutCase, mesh: Mesh | None = None) -> Engine:
    """The engine of a case with drawn weights. Every rank must call this."""
    engine = build_engine(config_of(case), mesh or mesh_of(case.layout))
    draw_weights(engine)
    return engine


def _measure(
    case: LayoutCase, mesh: Mesh, num_steps: int, telling_kinds: Sequence[str]
) -> RankOutcome:
    engine = engine_of(case, mesh)
    steps = {kind: make_step(kind, mesh, case.micro_batch_size, case.tower) for kind in KINDS}
    loss_sums, norms, grads = {}, {}, {}
    for kind in telling_kinds:
        engine.optimizer.zero_grad()
        microbatches = steps[kind].microbatches
        loss = microbatch_losses(engine.chunks, microbatches, mesh, forward_only=False).sum()
        loss_sums[kind] = float(loss)
        norms[kind] = float(engine.optimizer.squared_grad_norm()) ** 0.5
        grads[kind] = engine.optimizer.local_grads()
    targets = {kind: count(step, mesh).num_supervised_tokens for kind, step in steps.items()}
    lr = {part: LR if part in TRAINED[case.stage] else 0.0 for part in ("vit", "adapter", "llm")}
    for kind in itertools.islice(itertools.cycle(steps), num_steps):
        train_step(engine, steps[kind], lr)
    engine.optimizer.gather_weights()
    return RankOutcome(
        mesh.tp_rank,
        mesh.pp_rank,
        mesh.dp_rank,
        loss_sums,
        targets,
        norms,
        grads,
        parameters={name: p.detach().clone() for name, p in engine.parameters.items() if num_steps},
        trained={name for name, p in engine.parameters.items() if p.requires_grad},
        with_gradient={
            name
            for name, p in engine.parameters.items()
            if p.grad is not None or hasattr(p, "main_grad")
        },
        with_state=set(whole_state(engine)),
    )


def config_of(case: LayoutCase) -> Config:
    """A run of this case; only what the engine reads is set."""
    layout, trained = case.layout, TRAINED[case.stage]
    zero, _, overlap = case.zero.partition("+")
    parts = {part: PartConfig(train=part in trained, lr=LR) for part in ("vit", "adapter", "llm")}
    return Config(
        model=small_model(
            heads=8,
            kv_heads=4,
            head_dim=8,
            tied=case.tied,
            tower=case.tower,
            vision_head_dim=8,
            num_layers=sum(layout.layers),
        ),
        stage=StageConfig(name=case.stage, token_budget=10**9, **parts),
        train=TrainConfig(seq_len=SEQ_LEN, precision=Precision[case.precision]),
        parallel=ParallelConfig(
            tp=layout.tp,
            pp=layout.pp,
            sequence_parallel=layout.sequence_parallel,
            layout=list(layout.layers),
            vpp=layout.vpp,
            recompute=_recompute(case),
            overlap=OverlapConfig(
                grad_reduce=overlap in ("grads", "all"),
                param_gather=overlap == "all",
                p2p=overlap == "all" and layout.vpp > 1,
                tp_comm=case.zero != "megatron" and layout.sequence_parallel,
            ),
        ),
        optimizer=OptimizerConfig(zero=Zero[zero], clip_grad=CLIP_GRAD, eps=EPS),
    )


def _recompute(case: LayoutCase) -> RecomputeConfig:
    if case.llm in ("none", "full"):
        return RecomputeConfig(vit=Recompute[case.vit], llm=Recompute[case.llm])
    modules = case.llm.split("+")
    return RecomputeConfig(vit=Recompute[case.vit], llm=Recompute.selective, modules=modules)


def draw_weights(engine: Engine) -> None:
    """The same model in every layout: full tensors drawn by global name, this rank's piece kept."""
    mesh = engine.mesh
    with torch.no_grad():
        for name, parameter in engine.parameters.items():
            drawn_as = EMBEDDING if engine.sharding.tied and name == HEAD else name
            sharding = engine.sharding[name]
            full = _draw(drawn_as, full_shape(parameter, sharding, mesh.dims.tp))
            parameter.copy_(shard(full, sharding, mesh.tp_rank, mesh.dims.tp))
    engine.optimizer.refresh_master_weights()


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Matrices at 1/sqrt(fan_in), norm weights around 1, biases around 0 with deviation 0.2."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.empty(shape).normal_(generator=generator)
    if len(shape) > 1:
        return noise * shape[-1] ** -0.5
    return 0.2 * noise if name.endswith("bias") else 1.0 + 0.2 * noise


def make_step(kind: str, mesh: Mesh, micro_batch_size: int, tower: str = "plain") -> Step:
    """This rank's share of the global batch."""
    share = NUM_PACKS // mesh.dims.dp
    packs = range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
    microbatches = [
        _batch(kind, packs[start : start + micro_batch_size], mesh, tower)
        for start in range(0, share, micro_batch_size)
    ]
    return Step(microbatches, tuple(packs), unreadable=[], num_sources=1)


def _batch(kind: str, packs: Iterable[int], mesh: Mesh, tower: str) -> Batch:
    segments = [segment for pack in packs for segment in _pack(kind, pack)]
    if not mesh.reads_media:
        segments = [Segment(s.sample_id, s.input_ids, s.targets, s.grid_thw, ()) for s in segments]
    model = ModelConfig(tokens=TOKENS, vision=VisionConfig(**TOWERS[tower]))
    return collate(segments, model, pad_to=mesh.dims.tp, with_pixels=mesh.reads_media)


def _pack(kind: str, number: int) -> list[Segment]:
    """Up to three samples; the number of targets differs much, pack 5 has none."""
    rng = np.random.default_rng([zlib.crc32(kind.encode()), number])
    samples = []
    for index in range(1 + number % 3):
        grids = [(2, 4), (6, 2)][: 1 + index] if number in PACKS_WITH_IMAGES[kind] else []
        sample = conversation(rng, grids)
        if number == 5:
            sample.targets[:] = 0
        grid_thw = np.array(sample.grids, np.int64).reshape(-1, 3)
        pixels = (sample.pixels,)
        samples.append(
            Segment(SampleId(0, index), sample.input_ids, sample.targets, grid_thw, pixels)
        )
    return samples


def join(pieces: Sequence[RankOutcome], case: LayoutCase) -> LayoutOutcome:
    """The whole model's outcome, from those of all ranks."""
    assert all(piece.norms == pieces[0].norms for piece in pieces), "ranks differ in the norm"
    for piece in pieces:
        assert piece.with_gradient == piece.with_state == piece.trained
    replicas = [piece for piece in pieces if piece.tp_rank == 0]
    kinds = pieces[0].norms
    sums = {kind: sum(piece.loss_sums[kind] for piece in replicas) for kind in kinds}
    return LayoutOutcome(
        losses={kind: sums[kind] / pieces[0].num_supervised_tokens[kind] for kind in kinds},
        norms=pieces[0].norms,
        grads={kind: _join(pieces, case, lambda p, k=kind: p.grads[k]) for kind in kinds},
        parameters=_join(pieces, case, lambda piece: piece.parameters),
    )


def _join(
    pieces: Sequence[RankOutcome],
    case: LayoutCase,
    tensors_of: Callable[[RankOutcome], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Full tensors by name; of replicated ones every replica, along a new first dimension."""
    found: dict[str, dict[int, list[Tensor]]] = {}
    for piece in pieces:
        for name, tensor in tensors_of(piece).items():
            found.setdefault(name, {}).setdefault(piece.tp_rank, []).append(tensor)
    joined: dict[str, list[Tensor]] = {}
    table = sharding_table(config_of(case).model)
    for name, by_tp in found.items():
        rows = [by_tp[tp_rank] for tp_rank in sorted(by_tp)]
        if table[name] is TensorSharding.REPLICATED:
            copies = [tensor for row in rows for tensor in row]
        else:
            columns = zip(*rows, strict=True)
            copies = [unshard(column, table[name]) for column in columns]
        known_as = EMBEDDING if case.tied and name == HEAD else name
        joined.setdefault(known_as, []).extend(copies)
    return {name: torch.stack(copies) for name, copies in joined.items()}


def distance(got: LayoutOutcome, want: LayoutOutcome) -> LayoutDistance:
    """Compare every replica with the single process, in fp64, in the kinds that ``got`` has.

    A gradient that is zero in theory counts against 1e-7 of the largest one.
    """
    grads: dict[str, float] = {}
    for kind in got.grads:
        tensors = want.grads[kind]
        assert got.grads[kind].keys() == tensors.keys()
        floor = 1e-7 * max(float(grad.abs().max()) for grad in tensors.values())
        for name, tensor in tensors.items():
            scale = max(float(tensor.abs().max()), floor) or 1.0
            grads[f"{name} ({kind})"] = _largest(got.grads[kind][name], tensor) / scale
    moved = [_largest(tensor, want.parameters[name]) for name, tensor in got.parameters.items()]
    worst = max(grads, key=lambda name: grads[name])
    return LayoutDistance(
        loss=max(_relative(loss, want.losses[kind]) for kind, loss in got.losses.items()),
        norm=max(_relative(norm, want.norms[kind]) for kind, norm in got.norms.items()),
        grads=grads[worst],
        parameters=max(moved, default=0.0) / LR,
        worst=worst,
    )


def _relative(got: float, want: float) -> float:
    return abs(got - want) / want if want else abs(got)


def _largest(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want[:1].double()).abs().max())


LAYOUTS = (
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(tp=4),
    Layout(tp=4, sequence_parallel=True),
    Layout(pp=2, layers=(1, 3)),
    Layout(pp=2, layers=(2, 2)),
    Layout(pp=2, layers=(3, 1)),
    Layout(pp=3, layers=(1, 1, 2)),
    Layout(pp=3, layers=(2, 1, 1)),
    Layout(pp=4, layers=(1, 1, 1, 1)),
    Layout(dp=2),
    Layout(dp=4),
    Layout(tp=2, pp=2, layers=(1, 3)),
    Layout(tp=2, pp=2, layers=(2, 2), sequence_parallel=True),
    Layout(tp=2, pp=2, layers=(3, 1), sequence_parallel=True),
    Layout(tp=2, dp=2),
    Layout(tp=2, dp=2, sequence_parallel=True),
    Layout(pp=2, dp=2, layers=(1, 3)),
    Layout(pp=2, dp=2, layers=(2, 2)),
    Layout(pp=2, layers=(1, 1, 1, 1), vpp=2),
    Layout(pp=2, dp=2, layers=(1, 1, 1, 1), vpp=2),
    Layout(tp=2, pp=2, layers=(1, 1, 1, 1), vpp=2),
    Layout(tp=2, pp=2, layers=(1, 1, 1, 1), vpp=2, sequence_parallel=True),
    Layout(dp=8),
    Layout(tp=4, dp=2, sequence_parallel=True),
    Layout(tp=4, pp=2, layers=(1, 3)),
    Layout(pp=4, dp=2, layers=(1, 1, 1, 1)),
    Layout(tp=2, pp=2, dp=2, layers=(1, 3), sequence_parallel=True),
    Layout(tp=2, pp=2, dp=2, layers=(1, 1, 1, 1), vpp=2, sequence_parallel=True),
    Layout(tp=2, pp=4, layers=(1, 1, 1, 1), sequence_parallel=True),
)
"""On up to 8 ranks."""
LAYOUTS_OF_8_LAYERS = (
    Layout(pp=2, layers=(2, 2, 3, 1), vpp=2),
    Layout(pp=2, layers=(1,) * 8, vpp=4),
    Layout(pp=4, layers=(1,) * 8, vpp=2),
    Layout(pp=8, layers=(1,) * 8),
)


def grid(layout: Layout) -> list[LayoutCase]:
    """Every case of a layout."""
    choices = (
        TRAINED,
        (False, True),
        (1, 2),
        ("none", "full"),
        ("none", "core_attn", "mlp", "core_attn+mlp", "full"),
        ("megatron", "megatron+grads", "megatron+all", "deepspeed"),
    )
    cases = [LayoutCase(layout, *chosen) for chosen in itertools.product(*choices)]
    return [case for case in cases if _is_whole(case)]


def _is_whole(case: LayoutCase) -> bool:
    """Interleaved, groups of as many microbatches as stages pass the chunks together."""
    num_microbatches = NUM_PACKS // case.layout.dp // case.micro_batch_size
    groups = case.layout.pp if case.layout.vpp > 1 else 1
    return num_microbatches > 0 and num_microbatches % groups == 0


def is_for_make_test(layout: Layout) -> bool:
    """Up to 4 ranks with tp and dp of at most 2, and the one of 8 in which all come together.

    Of a tensor or a sum, 4 ranks take what 2 take, only more often: nothing in this project or
    in megatron-core asks whether there are more than 2. Pipelines of 3 and 4 stay: only they have
    stages that are neither the first nor the last.
    """
    everything = Layout(tp=2, pp=2, dp=2, layers=(1, 1, 1, 1), vpp=2, sequence_parallel=True)
    return (layout.world_size <= 4 and max(layout.tp, layout.dp) <= 2) or layout == everything


def pairs(case: LayoutCase) -> set[tuple[Any, ...]]:
    """Every two choices that the case makes together, and its layout."""
    layers = case.layout.layers
    choices = vars(case.layout) | vars(case)
    del choices["layout"]
    choices["layers"] = "even" if len(set(layers)) == 1 else layers.index(max(layers))
    return {("layout", str(case.layout)), *itertools.combinations(choices.items(), 2)}


def cover(cases: Sequence[LayoutCase], covered: Sequence[LayoutCase] = ()) -> Iterator[LayoutCase]:
    """Cheap cases that make together, with those ``covered``, every two choices that any of
    ``cases`` makes; greedily.
    """
    pairs_of = {case: pairs(case) for case in cases}
    missing = set().union(*pairs_of.values()) - set().union(*map(pairs, covered))
    while missing:
        best = max(cases, key=lambda case: len(pairs_of[case] & missing) / _price(case.layout))
        missing -= pairs_of[best]
        yield best


def _price(layout: Layout) -> float:
    """CPU-seconds of a case, about: what a rank does besides matrix products, and waits for."""
    waiting = {1: 0.0, 2: 0.4, 4: 1.1}[layout.tp]
    return layout.world_size * (0.1 + waiting) + 0.3 * layout.tp


if __name__ == "__main__":
    whole_grid = [case for layout in LAYOUTS for case in grid(layout)]
    in_make_test = list(cover([case for case in whole_grid if is_for_make_test(case.layout)]))
    print(*sorted(map(str, in_make_test)), sep="\n")
    print("\nand, left to make test-full:\n")
    print(*sorted(map(str, cover(whole_grid, in_make_test))), sep="\n")

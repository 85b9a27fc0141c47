"""How ranks, heads, layers and packs divide."""

from collections.abc import Iterator
from math import gcd

from triptych.configs.model_schema import ModelConfig
from triptych.configs.problems import Problem, either, typed_list
from triptych.configs.schema import Config, Zero

SPLIT = {
    "vision": ("num_heads", "intermediate_size"),
    "language": ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"),
}
"""Tower -> its sizes that tensor parallelism splits."""


def check_parallel(config: Config, world_size: int) -> Iterator[Problem]:
    """The ranks divide, and tp divides what it splits."""
    parallel, tp, pp = config.parallel, config.parallel.tp, config.parallel.pp
    yield from check_ranks(world_size, tp, pp, keys=("parallel.tp", "parallel.pp"))
    yield from check_split(config.model, tp, "parallel.tp")
    if parallel.sequence_parallel and tp == 1:
        yield Problem(
            "parallel.sequence_parallel=true has no ranks to shard over at parallel.tp=1",
            "parallel.sequence_parallel=false",
        )


def check_ranks(world_size: int, tp: int, pp: int, keys: tuple[str, str]) -> Iterator[Problem]:
    """The ranks divide; ``keys`` are what a person sets tp and pp by."""
    if world_size % (tp * pp) == 0:
        return
    below = world_size // (tp * pp) * tp * pp
    good = [count for count in (below, below + tp * pp) if count]
    product = f"{keys[0]}*{keys[1].rpartition('.')[2]}"
    yield Problem(
        f"{world_size} ranks must be a multiple of {product} = {tp}*{pp}={tp * pp}",
        f"{either(good)} ranks, or other {' and '.join(keys)}",
    )


def check_split(model: ModelConfig, tp: int, key: str) -> Iterator[Problem]:
    """Tp divides what it splits; ``key`` is what a person sets tp by."""
    shared = gcd(
        *(getattr(getattr(model, tower), size) for tower, sizes in SPLIT.items() for size in sizes)
    )
    good = [degree for degree in range(1, shared + 1) if shared % degree == 0]
    nearest = sorted(sorted(good, key=lambda degree: abs(degree - tp))[:2])
    for tower, sizes in SPLIT.items():
        values = {size: getattr(getattr(model, tower), size) for size in sizes}
        undivided = [f"{size}={value}" for size, value in values.items() if value % tp]
        if undivided:
            yield Problem(
                f"{key}={tp} must divide model.{tower}.{' and '.join(undivided)}",
                either([f"{key}={degree}" for degree in nearest]),
            )


def check_interleaving(config: Config) -> Iterator[Problem]:
    """Only combinations of megatron-core's interleaved schedule that compute the right thing."""
    parallel = config.parallel
    if parallel.vpp > 1 and parallel.pp == 1:
        yield Problem(
            f"parallel.vpp={parallel.vpp} has no pipeline to interleave at parallel.pp=1",
            "parallel.vpp=1",
        )
    if parallel.overlap.p2p and parallel.vpp == 1:
        yield Problem(
            "parallel.overlap.p2p=true needs chunks to compute while messages travel, "
            "but parallel.vpp=1",
            "parallel.overlap.p2p=false or parallel.vpp=2",
        )


def check_overlap(config: Config) -> Iterator[Problem]:
    """What each overlap is done by, and what it follows."""
    overlap = config.parallel.overlap
    asked = [name for name in ("grad_reduce", "param_gather") if getattr(overlap, name)]
    if asked and config.optimizer.zero is Zero.deepspeed:
        yield Problem(
            f"parallel.overlap.{' and '.join(asked)} needs optimizer.zero=megatron; "
            "DeepSpeed's optimizer is used after the backward pass",
            "optimizer.zero=megatron or "
            + " ".join(f"parallel.overlap.{name}=false" for name in asked),
        )
    elif overlap.param_gather and not overlap.grad_reduce:
        yield Problem(
            "parallel.overlap.param_gather=true needs parallel.overlap.grad_reduce=true",
            "parallel.overlap.grad_reduce=true",
        )
    if overlap.tp_comm and not config.parallel.sequence_parallel:
        yield Problem(
            "parallel.overlap.tp_comm=true splits what sequence parallelism gathers and scatters, "
            "but parallel.sequence_parallel=false",
            "parallel.sequence_parallel=true or parallel.overlap.tp_comm=false",
        )
    per_node = config.cluster.gpus_per_node
    if overlap.tp_comm and per_node is not None and config.parallel.tp > per_node:
        yield Problem(
            "parallel.overlap.tp_comm=true goes through NVLink, but "
            f"parallel.tp={config.parallel.tp} is more than a node has: "
            f"cluster.gpus_per_node={per_node}",
            "parallel.overlap.tp_comm=false",
        )


def check_layout(config: Config) -> Iterator[Problem]:
    """Every model chunk of every pipeline stage has a decoder layer."""
    layout, pp, vpp = config.parallel.layout, config.parallel.pp, config.parallel.vpp
    num_layers, num_chunks = config.model.language.num_layers, pp * vpp
    chunks = "parallel.pp" if vpp == 1 else "parallel.pp*vpp"
    if num_chunks > num_layers:
        fewer = f"parallel.pp={num_layers}" if vpp == 1 else "smaller parallel.pp or parallel.vpp"
        yield Problem(
            f"{chunks}={num_chunks} must be at most model.language.num_layers={num_layers}", fewer
        )
        return
    if layout == "auto":
        return
    even = typed_list(even_layers(num_layers, num_chunks))
    remedy = f"parallel.layout={even} or parallel.layout=auto"
    if not isinstance(layout, list) or not all(type(count) is int for count in layout):
        yield Problem(f"parallel.layout={layout} must be auto or a list of layer counts", remedy)
        return
    given = f"parallel.layout={typed_list(layout)}"
    if len(layout) != num_chunks:
        yield Problem(f"{given} must have {chunks}={num_chunks} entries", remedy)
    elif min(layout) < 1:
        yield Problem(f"{given} must leave every pipeline stage a decoder layer", remedy)
    elif sum(layout) != num_layers:
        yield Problem(
            f"{given} adds up to {sum(layout)}, not to model.language.num_layers={num_layers}",
            remedy,
        )


def even_layers(num_layers: int, num_chunks: int) -> list[int]:
    """Decoder layers of each chunk, of equal numbers where that goes, else one more in the last."""
    spare = num_chunks - num_layers % num_chunks
    return [num_layers // num_chunks + (chunk >= spare) for chunk in range(num_chunks)]


def check_batch(config: Config, world_size: int) -> Iterator[Problem]:
    """A global batch is a whole number of microbatches on every data-parallel rank."""
    train, num_model_ranks = config.train, config.parallel.tp * config.parallel.pp
    if world_size % num_model_ranks:
        return
    dp = world_size // num_model_ranks
    unit = train.micro_batch_size * dp
    below, rest = divmod(train.global_batch_size, unit)
    if rest:
        good = [count * unit for count in (below, below + 1) if count]
        yield Problem(
            f"train.global_batch_size={train.global_batch_size} must be a multiple of"
            f" micro_batch_size*dp = {train.micro_batch_size}*{dp}={unit}",
            either([f"train.global_batch_size={count}" for count in good]),
        )
        return
    pp = config.parallel.pp
    if config.parallel.vpp > 1 and below % pp:
        good = [count * pp * unit for count in (below // pp, below // pp + 1) if count]
        yield Problem(
            f"train.global_batch_size={train.global_batch_size} gives {below} microbatches per "
            f"step, but with parallel.vpp={config.parallel.vpp} they go through the chunks in "
            f"groups of parallel.pp={pp}",
            either([f"train.global_batch_size={count}" for count in good]),
        )

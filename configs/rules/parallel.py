"""How ranks, heads, layers and packs divide."""

from collections.abc import Iterator
from math import gcd

from triptych.configs.problems import Problem, either, typed_list
from triptych.configs.schema import Config

SPLIT = {
    "vision": ("num_heads", "intermediate_size"),
    "language": ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size"),
}
"""Tower -> its sizes that tensor parallelism splits."""


def check_parallel(config: Config, world_size: int) -> Iterator[Problem]:
    """The ranks divide, and tp divides what it splits."""
    parallel, tp, pp = config.parallel, config.parallel.tp, config.parallel.pp
    if world_size % (tp * pp):
        below = world_size // (tp * pp) * tp * pp
        good = [count for count in (below, below + tp * pp) if count]
        yield Problem(
            f"{world_size} ranks must be a multiple of parallel.tp*pp = {tp}*{pp}={tp * pp}",
            f"{either(good)} ranks, or other parallel.tp and parallel.pp",
        )
    shared = gcd(
        *(getattr(getattr(config.model, tower), size) for tower in SPLIT for size in SPLIT[tower])
    )
    good = [degree for degree in range(1, shared + 1) if shared % degree == 0]
    nearest = sorted(sorted(good, key=lambda degree: abs(degree - tp))[:2])
    for tower, sizes in SPLIT.items():
        values = {size: getattr(getattr(config.model, tower), size) for size in sizes}
        undivided = [f"{size}={value}" for size, value in values.items() if value % tp]
        if undivided:
            yield Problem(
                f"parallel.tp={tp} must divide model.{tower}.{' and '.join(undivided)}",
                either([f"parallel.tp={degree}" for degree in nearest]),
            )
    if parallel.sequence_parallel and tp == 1:
        yield Problem(
            "parallel.sequence_parallel=true has no ranks to shard over at parallel.tp=1",
            "parallel.sequence_parallel=false",
        )


def check_layout(config: Config) -> Iterator[Problem]:
    """Every pipeline stage has a decoder layer."""
    layout, pp = config.parallel.layout, config.parallel.pp
    num_layers = config.model.language.num_layers
    if pp > num_layers:
        yield Problem(
            f"parallel.pp={pp} must be at most model.language.num_layers={num_layers}",
            f"parallel.pp={num_layers}",
        )
        return
    if layout == "auto":
        return
    even = [num_layers // pp + (stage >= pp - num_layers % pp) for stage in range(pp)]
    remedy = f"parallel.layout={typed_list(even)} or parallel.layout=auto"
    if not isinstance(layout, list) or not all(type(count) is int for count in layout):
        yield Problem(f"parallel.layout={layout} must be auto or a list of layer counts", remedy)
        return
    given = f"parallel.layout={typed_list(layout)}"
    if len(layout) != pp:
        yield Problem(f"{given} must have parallel.pp={pp} entries", remedy)
    elif min(layout) < 1:
        yield Problem(f"{given} must leave every pipeline stage a decoder layer", remedy)
    elif sum(layout) != num_layers:
        yield Problem(
            f"{given} adds up to {sum(layout)}, not to model.language.num_layers={num_layers}",
            remedy,
        )


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

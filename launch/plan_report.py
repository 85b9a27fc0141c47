"""A plan as text: tables, and where every number comes from."""

from collections.abc import Sequence

from triptych.configs.rules.cluster import NEEDED, UNMEASURED
from triptych.configs.schema import PARTS, Config, Recompute
from triptych.costs.estimate import DAY_S, Estimate
from triptych.costs.pieces import Piece, trained
from triptych.costs.work import EXPECTED_SEGMENTS

GIB = 2**30


def report(plan: Estimate) -> str:
    """The whole plan of one layout."""
    sections = (_headline, _parameters, _memory, _pipeline, _communication, _result, _sources)
    return "\n\n".join(section(plan) for section in sections)


def layouts_table(best: Sequence[Estimate], *, gpus: int) -> str:
    """The best layouts that were found."""
    title = f"Best layouts for {gpus} devices, of those that fit; sequence parallel where tp > 1"
    if not best:
        return f"{title}: none fits  -> try more cluster.gpus, or a smaller train.seq_len"
    head = ["tp", "pp", "vpp", "dp", "packs", "m", "recompute", "GiB", "bubble", "step s", "MFU"]
    return "\n".join([title, table([[*head, "days"], *map(_layout_row, best)])])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, the first row above a line."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _headline(plan: Estimate) -> str:
    config, shape = plan.config, plan.shape
    parallel, train = config.parallel, config.train
    sharded = ", sequence parallel" if parallel.sequence_parallel else ""
    chunks = f", {parallel.vpp} chunks per stage" if parallel.vpp > 1 else ""
    frozen = [part for part in PARTS if not getattr(config.stage, part).train]
    return (
        f"{config.stage.name} of {config.model.name} on {plan.gpus} devices: "
        f"tp {parallel.tp} x pp {parallel.pp} x dp {shape.dp}{sharded}{chunks}; "
        f"recompute {_recompute(config)}; frozen: {', '.join(frozen) or 'nothing'}\n"
        f"step: {train.global_batch_size} packs x {train.seq_len} tokens = "
        f"{plan.tokens_per_step:,} tokens, in {shape.num_microbatches} microbatches per replica "
        f"of {shape.load.num_tokens} tokens and {shape.load.num_patches} ViT patches each"
    )


def _parameters(plan: Estimate) -> str:
    pp = plan.config.parallel.pp
    rows = [["stage", "layers", *PARTS, "total", "replicated", "trained"]]
    for stage, pieces in enumerate(plan.pieces):
        held = sum(pieces.values(), Piece())
        layers = "+".join(str(count) for count in plan.layers[stage::pp])
        counts = [*(pieces[part].total for part in PARTS), held.total, held.replicated]
        counts.append(trained(plan.config, pieces))
        rows.append([str(stage), layers, *(f"{count:,}" for count in counts)])
    return f"Parameters on one rank, exact; replicated: the same on all tp ranks\n{table(rows)}"


def _memory(plan: Estimate) -> str:
    cluster, pp = plan.config.cluster, plan.config.parallel.pp
    head = ["stage", "weights", "gradients", "optimizer", "activations", "(one microbatch)"]
    rows = [[*head, "working", "total"]]
    for stage, memory in enumerate(plan.memory):
        one = sum(chunk.total for chunk in plan.kept[stage::pp])
        sizes = [memory.weights, memory.gradients, memory.optimizer, memory.activations, one]
        sizes += [memory.working, memory.total]
        rows.append([str(stage), *(f"{size / GIB:.2f}" for size in sizes)])
    usable = f"{cluster.memory_gib} less {cluster.reserved_gib} reserved"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return f"Memory on one rank at its fullest, GiB; of {usable}: {verdict}\n{table(rows)}"


def _pipeline(plan: Estimate) -> str:
    pp = plan.config.parallel.pp
    rows = [["stage", "forward ms", "backward ms", "busy"]]
    for stage in range(pp):
        passes = [event for event in plan.timeline.events if event.stage == stage]
        forward = sum(e.end_s - e.start_s for e in passes if not e.is_backward)
        backward = sum(e.end_s - e.start_s for e in passes if e.is_backward)
        count = plan.shape.num_microbatches
        busy = (forward + backward) / plan.timeline.makespan_s
        times = [f"{seconds / count * 1e3:.1f}" for seconds in (forward, backward)]
        rows.append([str(stage), *times, f"{busy:.1%}"])
    return (
        f"Pipeline, per microbatch: bubble {plan.timeline.bubble:.1%} "
        f"(equal stages: {plan.ideal_bubble:.1%})\n{table(rows)}"
    )


def _communication(plan: Estimate) -> str:
    rows = [["axis", "sent GB", "waits s"]]
    rows += [
        [axis, f"{exchange.sent_bytes / 1e9:.1f}", f"{exchange.awaited_s:.3f}"]
        for axis, exchange in (("tp", plan.tp), ("pp", plan.pp), ("dp", plan.dp))
    ]
    return (
        "Communication of one rank per step, on the stage with most of it\n"
        f"{table(rows)}\n"
        "tp's waiting is within the passes above, pp's between them, dp's at the end of the step"
    )


def _result(plan: Estimate) -> str:
    config = plan.config
    vision, language = plan.flops_per_token
    rate = plan.tokens_per_day / DAY_S
    return "\n".join(
        [
            f"FLOPs per token  {(vision + language) / 1e9:.1f} G: ViT {vision / 1e9:.1f} G "
            f"({vision / (vision + language):.0%}), language model {language / 1e9:.1f} G",
            f"step             {plan.step_s:.2f} s",
            f"MFU              {plan.mfu:.1%} of {config.cluster.peak_tflops:g} TFLOP/s",
            f"tokens           {rate:,.0f} per second, {plan.tokens_per_day / 1e9:.1f} G per day",
            f"{config.stage.token_budget / 1e9:,.0f} G tokens take {plan.days:.1f} days",
        ]
    )


def _sources(plan: Estimate) -> str:
    cluster, data = plan.config.cluster, plan.config.data
    values: dict[str, object] = {n: getattr(cluster, n) for n in NEEDED if n != "gpus"}
    rates = cluster.efficiency
    values["efficiency"] = (
        f"{{vit: {rates.vit:g}, linear: {rates.linear:g}, attention: {rates.attention:g}, "
        f"head: {rates.head:g}}}"
    )
    kinds: dict[str, list[str]] = {"described": [], "measured": [], "assumed": []}
    for name, value in values.items():
        kind = "described" if name not in UNMEASURED else "assumed"
        kinds["measured" if name in cluster.measured else kind].append(f"cluster.{name}={value}")
    kinds["assumed"] += [
        f"data.vision_share={data.vision_share}",
        f"data.image_patches={data.image_patches}",
        f"full packs of {EXPECTED_SEGMENTS} equal samples",
        "the norm and attention kernels of CUDA",
    ]
    if plan.config.parallel.overlap.tp_comm:
        kinds["assumed"].append("a layer's products outlast what its tp ranks exchange meanwhile")
    return "\n".join(
        [
            "Where this comes from",
            "computed   parameters, FLOPs, bytes kept and sent, the order of passes",
            *(f"{kind:<10} {', '.join(texts)}" for kind, texts in kinds.items() if texts),
            "left out   the optimizer's update, reading data, checkpoints, slower ranks",
        ]
    )


def _layout_row(plan: Estimate) -> list[str]:
    parallel, shape = plan.config.parallel, plan.shape
    fullest = max(stage.total for stage in plan.memory)
    counts = (parallel.tp, parallel.pp, parallel.vpp, shape.dp, plan.config.train.micro_batch_size)
    return [
        *map(str, counts),
        str(shape.num_microbatches),
        _recompute(plan.config),
        f"{fullest / GIB:.1f}",
        f"{plan.timeline.bubble:.1%}",
        f"{plan.step_s:.2f}",
        f"{plan.mfu:.1%}",
        f"{plan.days:.1f}",
    ]


def _recompute(config: Config) -> str:
    """``llm mlp, vit``, or nothing."""
    recompute = config.parallel.recompute
    texts = []
    if recompute.llm is not Recompute.none:
        full = recompute.llm is Recompute.full
        texts.append(f"llm {'full' if full else '+'.join(recompute.modules)}")
    if recompute.vit is not Recompute.none:
        texts.append("vit")
    return ", ".join(texts) or "nothing"

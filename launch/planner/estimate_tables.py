"""A plan as text: tables, and where every number comes from."""

from collections.abc import Sequence

from triptych.configs.rules.cluster import NEEDED, UNMEASURED
from triptych.configs.schema import PARTS, Config, Recompute
from triptych.costs.compute import EXPECTED_SEGMENTS
from triptych.costs.estimate import DAY_S, Estimate
from triptych.costs.parameter_shards import ParameterShard, trained

GIB = 2**30
LEFT_OUT = "the optimizer's update, reading data, checkpoints, slower ranks"


def report(estimate: Estimate) -> str:
    """The whole plan of one layout."""
    sections = (_headline, _parameters, _memory, _pipeline, _communication, _result, _sources)
    return "\n\n".join(section(estimate) for section in sections)


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


def _headline(estimate: Estimate) -> str:
    config, shape = estimate.config, estimate.shape
    parallel, train = config.parallel, config.train
    sharded = ", sequence parallel" if parallel.sequence_parallel else ""
    chunks = f", {parallel.vpp} chunks per stage" if parallel.vpp > 1 else ""
    frozen = [part for part in PARTS if not getattr(config.stage, part).train]
    return (
        f"{config.stage.name} of {config.model.name} on {estimate.gpus} devices: "
        f"tp {parallel.tp} x pp {parallel.pp} x dp {shape.dp}{sharded}{chunks}; "
        f"recompute {_recompute(config)}; frozen: {', '.join(frozen) or 'nothing'}\n"
        f"step: {train.global_batch_size} packs x {train.seq_len} tokens = "
        f"{estimate.tokens_per_step:,} tokens, in {shape.num_microbatches} microbatches per "
        f"replica of {shape.load.num_tokens} tokens and {shape.load.num_patches} ViT patches each\n"
        f"{_expectation(estimate)}"
    )


def _expectation(estimate: Estimate) -> str:
    """The speed as a range, and why it is one."""
    cluster, least = estimate.config.cluster, estimate.least_share
    tflops, per_second = estimate.tflops_per_gpu, estimate.tokens_per_day / DAY_S / estimate.gpus
    guessed = [f"cluster.{name}" for name in UNMEASURED if name not in cluster.measured]
    return (
        f"expected: {least * tflops:.0f} to {tflops:.0f} TFLOP/s and {least * per_second:,.0f} to "
        f"{per_second:,.0f} tokens/s per device, MFU {least * estimate.mfu:.0%} to "
        f"{estimate.mfu:.0%}; the stage takes {estimate.days:.0f} to {estimate.days / least:.0f} "
        f"days\n"
        f"guessed: {', '.join([*guessed, 'what the data are like'])}\n"
        f"left out: {LEFT_OUT}"
    )


def _parameters(estimate: Estimate) -> str:
    pp = estimate.config.parallel.pp
    rows = [["stage", "layers", *PARTS, "total", "replicated", "trained"]]
    for stage, shards in enumerate(estimate.shards):
        held = sum(shards.values(), ParameterShard())
        layers = "+".join(str(count) for count in estimate.layers[stage::pp])
        counts = [*(shards[part].total for part in PARTS), held.total, held.replicated]
        counts.append(trained(estimate.config, shards))
        rows.append([str(stage), layers, *(f"{count:,}" for count in counts)])
    return f"Parameters on one rank, exact; replicated: the same on all tp ranks\n{table(rows)}"


def _memory(estimate: Estimate) -> str:
    cluster, pp = estimate.config.cluster, estimate.config.parallel.pp
    head = ["stage", "weights", "gradients", "optimizer", "activations", "(one microbatch)"]
    rows = [[*head, "working", "total"]]
    for stage, memory in enumerate(estimate.memory):
        one = sum(chunk.total for chunk in estimate.activations[stage::pp])
        sizes = [memory.weights, memory.gradients, memory.optimizer, memory.activations, one]
        sizes += [memory.working, memory.total]
        rows.append([str(stage), *(f"{size / GIB:.2f}" for size in sizes)])
    usable = f"{cluster.memory_gib} less {cluster.reserved_gib} reserved"
    verdict = "fits" if estimate.fits else "DOES NOT FIT"
    return f"Memory on one rank at its fullest, GiB; of {usable}: {verdict}\n{table(rows)}"


def _pipeline(estimate: Estimate) -> str:
    pp = estimate.config.parallel.pp
    rows = [["stage", "forward ms", "backward ms", "busy"]]
    for stage in range(pp):
        passes = [event for event in estimate.timeline.events if event.stage == stage]
        forward = sum(e.end_s - e.start_s for e in passes if not e.is_backward)
        backward = sum(e.end_s - e.start_s for e in passes if e.is_backward)
        count = estimate.shape.num_microbatches
        busy = (forward + backward) / estimate.timeline.makespan_s
        times = [f"{seconds / count * 1e3:.1f}" for seconds in (forward, backward)]
        rows.append([str(stage), *times, f"{busy:.1%}"])
    return (
        f"Pipeline, per microbatch: bubble {estimate.timeline.bubble:.1%} "
        f"(equal stages: {estimate.ideal_bubble:.1%})\n{table(rows)}"
    )


def _communication(estimate: Estimate) -> str:
    rows = [["axis", "sent GB", "waits s"]]
    rows += [
        [axis, f"{exchange.bytes_sent / 1e9:.1f}", f"{exchange.exposed_s:.3f}"]
        for axis, exchange in (("tp", estimate.tp), ("pp", estimate.pp), ("dp", estimate.dp))
    ]
    return (
        "Communication of one rank per step, on the stage with most of it\n"
        f"{table(rows)}\n"
        "tp's waiting is within the passes above, pp's between them, dp's at the end of the step"
    )


def _result(estimate: Estimate) -> str:
    config = estimate.config
    vision, language = estimate.flops_per_token
    per_day = estimate.tokens_per_day
    return "\n".join(
        [
            f"FLOPs per token  {(vision + language) / 1e9:.1f} G: ViT {vision / 1e9:.1f} G "
            f"({vision / (vision + language):.0%}), language model {language / 1e9:.1f} G",
            f"step             {estimate.step_s:.2f} s",
            f"MFU              {estimate.mfu:.1%} of {config.cluster.peak_tflops:g} TFLOP/s",
            f"tokens           {per_day / DAY_S:,.0f} per second, {per_day / 1e9:.1f} G per day",
            f"{config.stage.token_budget / 1e9:,.0f} G tokens take {estimate.days:.1f} days",
        ]
    )


def _sources(estimate: Estimate) -> str:
    cluster, data = estimate.config.cluster, estimate.config.data
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
    if estimate.config.parallel.overlap.tp_comm:
        kinds["assumed"].append("a layer's products outlast what its tp ranks exchange meanwhile")
    return "\n".join(
        [
            "Where this comes from",
            "computed   parameters, FLOPs, bytes kept and sent, the order of passes",
            *(f"{kind:<10} {', '.join(texts)}" for kind, texts in kinds.items() if texts),
            f"left out   {LEFT_OUT}",
        ]
    )


def _layout_row(estimate: Estimate) -> list[str]:
    parallel, shape = estimate.config.parallel, estimate.shape
    fullest = max(stage.total for stage in estimate.memory)
    counts = (
        parallel.tp,
        parallel.pp,
        parallel.vpp,
        shape.dp,
        estimate.config.train.micro_batch_size,
    )
    return [
        *map(str, counts),
        str(shape.num_microbatches),
        _recompute(estimate.config),
        f"{fullest / GIB:.1f}",
        f"{estimate.timeline.bubble:.1%}",
        f"{estimate.step_s:.2f}",
        f"{estimate.mfu:.1%}",
        f"{estimate.days:.1f}",
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

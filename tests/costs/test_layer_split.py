"""The work of each part of the model, and the split of its layers over the pipeline."""

from itertools import combinations, pairwise

import pytest

from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.costs.compute import PassCompute, compute_of_pack, expected_load, part_compute
from triptych.costs.flops import Workload, forward_flops, training_flops
from triptych.costs.layer_split import layers_per_chunk, planned_bubble, planned_timeline

LOAD = Workload(8192, 4 * 2048**2, 16384, 16 * 1024**2)


def config(model: str, *overrides: str) -> Config:
    return load_config([f"model={model}", "data.vision_share=0.5", *overrides])


def training(config: Config, load: Workload) -> float:
    parts = {name: getattr(config.stage, name).train for name in ("vit", "adapter", "llm")}
    return training_flops(config.model, load, **parts)


def of_model(config: Config, load: Workload) -> PassCompute:
    parts = part_compute(config, load)
    return parts.vision + parts.layer * config.model.language.num_layers + parts.head


@pytest.mark.parametrize("stage", ["1", "2", "3", "warmup"])
def test_work_is_the_model_flops_where_nothing_is_done_twice(stage):
    """All of the head's is in the forward pass: the loss computes its gradients on the way."""
    run = config("qwen2_vl_7b", f"stage={stage}")
    work = of_model(run, LOAD)
    assert compute_of_pack(run)(LOAD) == pytest.approx(work.total)
    assert work.total == pytest.approx(training(run, LOAD))
    flops, head = forward_flops(run.model, LOAD), part_compute(run, LOAD).head
    assert head.backward == 0
    assert head.forward == pytest.approx((3 if run.stage.llm.train else 2) * flops.head.total)
    assert work.forward - head.forward == pytest.approx(flops.total - flops.head.total)


def test_tp_divides_all_but_the_merger():
    alone, split = config("qwen2_vl_7b"), config("qwen2_vl_7b", "parallel.tp=4")
    flops = forward_flops(alone.model, LOAD)
    assert part_compute(split, LOAD).layer * 4 == part_compute(alone, LOAD).layer
    assert part_compute(split, LOAD).vision.forward == pytest.approx(
        flops.vit.total / 4 + flops.adapter.total
    )


@pytest.mark.parametrize(
    ("recompute", "again"),
    [
        ("recompute.llm=full", lambda flops: flops.layers.total),
        ("recompute.llm=selective", lambda flops: flops.layers.attention),
        ("recompute.vit=full", lambda flops: flops.vit.total),
    ],
)
def test_recomputation_is_a_second_forward_pass_within_the_backward_pass(recompute, again):
    plain, run = config("qwen2_vl_7b"), config("qwen2_vl_7b", f"parallel.{recompute}")
    before, after = (of_model(c, LOAD) for c in (plain, run))
    assert after.forward == before.forward
    more = again(forward_flops(run.model, LOAD))
    assert after.backward - before.backward == pytest.approx(more)


def test_a_frozen_vit_is_not_recomputed():
    run = config("qwen2_vl_7b", "stage=3", "parallel.recompute.vit=full")
    assert part_compute(run, LOAD) == part_compute(config("qwen2_vl_7b", "stage=3"), LOAD)


def test_recomputed_mlp():
    run = config(
        "qwen2_vl_7b", "parallel.recompute.llm=selective", "parallel.recompute.modules=[mlp]"
    )
    h, f = 3584, 18944
    more = (
        part_compute(run, LOAD).layer.backward
        - part_compute(config("qwen2_vl_7b"), LOAD).layer.backward
    )
    assert more == pytest.approx(2 * 3 * h * f * LOAD.num_tokens)


def test_slow_work_weighs_more():
    slow = config("qwen2_vl_7b", "cluster.efficiency.vit=0.5")
    fast = part_compute(config("qwen2_vl_7b"), LOAD)
    assert part_compute(slow, LOAD).vision.total == pytest.approx(2 * fast.vision.total)
    assert part_compute(slow, LOAD).layer == fast.layer


def all_splits(num_layers: int, num_chunks: int):
    for cuts in combinations(range(1, num_layers), num_chunks - 1):
        bounds = [0, *cuts, num_layers]
        yield [end - begin for begin, end in pairwise(bounds)]


@pytest.mark.parametrize("model", ["debug", "qwen2_vl_7b"])
@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("stage", ["1", "2", "3"])
@pytest.mark.parametrize("share", [0.1, 0.8])
def test_no_split_has_a_faster_slowest_stage(model, pp, vpp, stage, share):
    run = config(
        model,
        f"stage={stage}",
        f"parallel.pp={pp}",
        f"parallel.vpp={vpp}",
        f"data.vision_share={share}",
    )
    parts = part_compute(run, expected_load(run))

    def slowest(layers) -> float:
        work = [chunk.total for chunk in parts.of_chunks(layers)]
        return max(sum(work[stage::pp]) for stage in range(pp))

    layers = layers_per_chunk(run)
    num_layers = run.model.language.num_layers
    assert sum(layers) == num_layers
    assert len(layers) == pp * vpp
    assert min(layers) >= 1
    best = min(slowest(split) for split in all_splits(num_layers, pp * vpp))
    assert slowest(layers) == pytest.approx(best)


def test_a_given_layout_is_kept():
    run = config("qwen2_vl_7b", "parallel.pp=4", "parallel.layout=[1,9,9,9]")
    assert layers_per_chunk(run) == (1, 9, 9, 9)


def test_more_vision_leaves_the_first_stage_fewer_layers():
    firsts = [
        layers_per_chunk(config("qwen2_vl_7b", "parallel.pp=4", f"data.vision_share={share}"))[0]
        for share in (0.0, 0.25, 0.5, 0.75)
    ]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[0] > firsts[-1]


def test_a_stage_with_a_frozen_vit_has_room_for_more_layers():
    pp4 = "parallel.pp=4"
    trained, frozen = (config("qwen2_vl_7b", f"stage={stage}", pp4) for stage in (2, 3))
    assert layers_per_chunk(frozen)[0] > layers_per_chunk(trained)[0]


def test_the_72b_model_at_pp8():
    """A naive split waits for the ViT; whole layers leave 4.3 points to the ideal.

    There are 10.3 layers' worth of work for each stage, but one stage has to have 11.
    """
    wide = ("parallel.tp=8", "parallel.pp=8", "stage=2")
    auto = config("qwen2_vl_72b", *wide)
    naive = config("qwen2_vl_72b", *wide, "parallel.layout=[10,10,10,10,10,10,10,10]")
    assert layers_per_chunk(auto) == (9, 11, 10, 10, 10, 10, 10, 10)
    bubbles = [planned_bubble(run, num_microbatches=64) for run in (naive, auto)]
    assert [round(bubble.planned, 3) for bubble in bubbles] == [0.194, 0.142]
    assert str(bubbles[1]) == "planned bubble 14.2% (ideal 9.9%)"
    chunked = config("qwen2_vl_72b", *wide, "parallel.vpp=2")
    assert str(planned_bubble(chunked, num_microbatches=64)) == "planned bubble 9.9% (ideal 5.2%)"


def test_planned_step_is_as_long_as_its_work():
    run = config("qwen2_vl_7b", "parallel.pp=1")
    work = of_model(run, expected_load(run))
    assert planned_timeline(run, num_microbatches=3).makespan_s == pytest.approx(3 * work.total)

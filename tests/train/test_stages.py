"""Stages: what trains, how fast, for how long; what is frozen costs nothing."""

import math
import re

import pytest
import torch

from triptych.configs.compose import load_config
from triptych.configs.schema import Config, Decay, Part, PartConfig, StageConfig
from triptych.models.feed import on_device
from triptych.models.parameters import part_of
from triptych.tests.helpers.layouts import (
    TRAINED,
    Layout,
    LayoutCase,
    engine_of,
    make_step,
)
from triptych.tests.helpers.runs import COVERING, LAYOUTS, Runs, metrics
from triptych.train.stages.parameter_counts import ParameterCounts, check_trained_parts
from triptych.train.stages.stage import Stage, learning_rate

distributed = pytest.mark.distributed

TRAINS = {
    "1": {Part.VIT, Part.ADAPTER},
    "1 stage.adapter.train=false": {Part.VIT},
    "2": {Part.VIT, Part.ADAPTER, Part.LLM},
    "3": {Part.ADAPTER, Part.LLM},
    "warmup": {Part.LLM},
}


@pytest.mark.parametrize("choice", TRAINS)
def test_a_stage_trains_its_parts(choice):
    stage = Stage(load_config(f"stage={choice}".split()))
    assert stage.trained_parts == TRAINS[choice]
    rates = stage.learning_rates(stage.token_budget // 2, 0)
    assert {part for part in Part if rates[part.value] > 0} == TRAINS[choice]


def test_a_stage_that_is_not_as_declared_is_refused():
    stage = Stage(load_config(["stage=3"]))
    good = ParameterCounts(
        {Part.VIT: 0, Part.ADAPTER: 5, Part.LLM: 7}, {Part.VIT: 3, Part.ADAPTER: 0, Part.LLM: 0}
    )
    check_trained_parts(stage, good)
    half_frozen = ParameterCounts(good.trained, {**good.frozen, Part.LLM: 1})
    with pytest.raises(AssertionError, match="stage3: llm is not as declared"):
        check_trained_parts(stage, half_frozen)


@pytest.mark.parametrize("decay", Decay)
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_learning_rates_warm_up_and_decay(decay, warmup):
    part = PartConfig(train=True, lr=3e-4, min_lr=1e-5, warmup=warmup, decay=decay)
    rates = [learning_rate(part, i / 1000, 1 / 1000) for i in range(1001)]
    peak = round(1000 * warmup)
    rising = [3e-4 * (i + 1) / peak for i in range(peak)]
    assert rates[:peak] == pytest.approx(rising), "no step is made at rate 0"
    assert max(rates) <= 3e-4 * (1 + 1e-12)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if warmup < 1:
        assert rates[peak] == pytest.approx(3e-4)
        assert rates[-1] == pytest.approx(3e-4 if decay is Decay.constant else 1e-5)


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [
        (Decay.constant, 1e-3),
        (Decay.linear, 1e-4 + 9e-4 * 0.75),
        (Decay.cosine, 1e-4 + 9e-4 * (0.5 + 0.5 * math.cos(math.pi / 4))),
    ],
)
def test_a_quarter_of_the_way_down(decay, wanted):
    part = PartConfig(train=True, lr=1e-3, min_lr=1e-4, warmup=0.2, decay=decay)
    assert learning_rate(part, 0.4, 0.01) == pytest.approx(wanted)


def test_past_its_budget_a_stage_keeps_the_last_rate_and_is_finished():
    part = PartConfig(train=True, lr=1e-3, min_lr=1e-4)
    off = PartConfig(train=False)
    parts = StageConfig(name="x", token_budget=100, vit=part, adapter=off, llm=part)
    stage = Stage(Config(stage=parts))
    assert stage.learning_rates(130, 9) == stage.learning_rates(100, 9)
    assert stage.learning_rates(100, 1)["vit"] == pytest.approx(1e-4)
    assert [stage.is_finished(tokens) for tokens in (0, 99, 100, 130)] == [False, False, True, True]


def test_a_horizon_of_the_run_ends_with_the_budget_or_the_cap_whichever_comes_first():
    small = ["stage=3", "model=qwen2_vl_7b", "stage.token_budget=1000000"]
    words = [*small, "train.global_batch_size=1", "train.seq_len=1", "stage.horizon=run"]
    free, capped = Stage(load_config(words)), Stage(load_config([*words, "train.num_steps=10"]))
    assert capped.learning_rates(500_000, 2) == free.learning_rates(500_000, 2)  # budget ahead
    assert capped.learning_rates(200_000, 5) == free.learning_rates(500_000, 5)  # cap ahead
    assert capped.learning_rates(0, 0)["llm"] == 1e-5  # a step is more than the warm-up
    assert capped.learning_rates(0, 10)["llm"] == pytest.approx(1e-6)
    assert capped.cut_short() == free.cut_short() == ""


def test_a_schedule_that_a_cap_cuts_short_is_told_of():
    """Twelve steps of stage 3, which is in warm-up for the first 39."""
    words = ["stage=3", "model=qwen2_vl_7b", "train.num_steps=12"]
    told = Stage(load_config(words)).cut_short()
    assert "train.num_steps=12 ends them at 0.0031 of the budget" in told
    assert (
        "adapter at 3.1e-06 in warm-up, llm at 3.1e-06 in warm-up\n  -> stage.horizon=run" in told
    )
    fitted = re.search(r"stage.token_budget=\d+", told)[0]
    assert Stage(load_config([*words, fitted])).cut_short() == ""
    debug = Stage(load_config([])).cut_short()
    assert "at 0.1 of the budget that they follow: vit at 9.8e-04 of 1.0e-03, adapter" in debug
    assert Stage(load_config(["train.num_steps=null"])).cut_short() == ""


@distributed
def test_rates_follow_consumed_tokens(pool, digits, tmp_path):
    """Not steps: a step's rate is that of the tokens before it, across a change of layout too."""
    runs = Runs(pool, digits, tmp_path)
    runs.train("run", "single", "train.num_steps=3")
    runs.train("run", "dp2", "train.num_steps=6")
    stage = Stage(load_config(runs.words("run", "single")))
    consumed = 0
    for line in metrics(runs.dir("run")):
        assert line["lr"] == stage.learning_rates(consumed, line["step"] - 1)
        consumed = line["consumed_tokens"]


@distributed
@pytest.mark.parametrize(
    ("stage", "layouts"),
    [
        pytest.param("1", COVERING, id="1"),
        *(pytest.param(s, LAYOUTS, id=f"{s} all", marks=pytest.mark.slow) for s in "123"),
    ],
)
def test_the_table_is_the_same_in_every_layout(stage, layouts, pool, digits, tmp_path):
    """Replicated and tied parameters count once; a stage of the pipeline may train nothing."""
    runs = Runs(pool, digits, tmp_path)
    tables = {}
    for layout in layouts:
        told = runs.train(layout, layout, f"stage={stage}", "train.num_steps=1").splitlines()
        start = next(i for i, line in enumerate(told) if " part  " in line)
        tables[layout] = [line.split()[2:] for line in told[start : start + 5]]  # after the time
    assert all(table == tables["single"] for table in tables.values())
    head, *rows, total = tables["single"]
    assert head == ["part", "trained", "frozen"]
    for (name, trained, frozen), part in zip(rows, Part, strict=True):
        assert name == part.value
        assert (trained == "0") == (part not in TRAINS[stage])
        assert (frozen == "0") == (part in TRAINS[stage])
    assert total[0] == "total"


@distributed
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2, layers=(1, 3))], ids=str)
@pytest.mark.parametrize("stage", TRAINED)
def test_what_is_frozen_builds_no_graph(stage, layout, pool):
    """And has no gradient buffer; what trains before it still gets its gradient through it."""
    for graphs, parts in pool(layout.world_size).run(graph_of, layout=layout, stage=stage):
        trains = set(TRAINED[stage])
        assert parts <= trains
        if graphs is not None:
            assert graphs == ("vit" in trains, bool(trains & {"vit", "adapter"}))


def graph_of(layout: Layout, stage: str) -> tuple[tuple[bool, bool] | None, set[str]]:
    """Whether ViT's and merger's outputs have a graph, where they are; parts with a buffer."""
    engine = engine_of(LayoutCase(layout, stage))
    mesh = engine.mesh
    buffered = {
        part_of(name).value
        for name, parameter in engine.parameters.items()
        if hasattr(parameter, "main_grad")
    }
    if not mesh.is_first_pp_stage:
        return None, buffered
    outputs: list[torch.Tensor] = []
    [model] = engine.bare_chunks
    for module in (model.vision, model.merger):
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(next(on_device(make_step("some", mesh, 1).microbatches, mesh, mesh.places(1)[0])))
    vit, merged = outputs
    return (vit.requires_grad, merged.requires_grad), buffered

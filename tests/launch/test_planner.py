"""launch/plan.py: what it prints, draws, refuses and costs; and the arithmetic behind it."""

import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import triptych
from triptych.configs.compose import load_config
from triptych.configs.rules.cluster import NEEDED
from triptych.configs.schema import Config
from triptych.configs.validate import validate, validate_plan
from triptych.costs import activation_memory, parameter_shards
from triptych.costs.communication import Links, tensor_communication
from triptych.costs.compute import expected_load
from triptych.costs.estimate import Estimate, estimate, usable_bytes
from triptych.costs.flops import training_flops
from triptych.costs.search import best_layouts
from triptych.errors import ConfigError
from triptych.launch import plan
from triptych.launch.planner import check
from triptych.launch.planner.estimate_tables import report
from triptych.launch.planner.timeline_plot import draw_timeline

ROOT = Path(triptych.__file__).parent
BIG = [  # in stage 2, as nothing else is said
    "model=qwen2_vl_72b",
    "parallel=tp8_pp8",
    "parallel.recompute.vit=full",
    "train.global_batch_size=1024",
    "cluster=h100",
    "cluster.gpus=1024",
]
WITHOUT_TORCH = """
import sys
from triptych.launch.cli import run
from triptych.launch.plan import main
try:
    run(main)
finally:
    assert not {"torch", "megatron", "matplotlib", "transformers"} & set(sys.modules)
"""


def config(*words: str) -> Config:
    return load_config([*BIG, *words])


def plan_of(*words: str) -> Estimate:
    return estimate(config(*words))


def test_the_command_prints_a_plan_without_torch() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *BIG]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for heading in ("Parameters", "Memory", "Pipeline", "Communication", "FLOPs", "Best layouts"):
        assert heading in done.stdout


@pytest.mark.slow
@pytest.mark.idle  # CPU-seconds double where other work takes the caches
def test_a_plan_takes_three_cpu_seconds() -> None:
    """Measured: 1.7 s with the search, most of it composing the configuration."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "launch/plan.py", *BIG]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


def test_help_prints_its_own_options_and_those_of_a_run_without_torch() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--picture" in done.stdout
    assert "parallel.tp" in done.stdout


def test_a_reader_that_leaves_is_no_traceback() -> None:
    """As in ``plan.py ... | head -1``."""
    words = "stage=2 model=qwen2_vl_72b parallel=tp8_pp8 cluster=h100 cluster.gpus=64"
    command = [sys.executable, "launch/plan.py", *words.split()]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as plan:
        assert plan.stdout
        assert plan.stderr
        plan.stdout.close()
        said = plan.stderr.read().decode()
    assert said.splitlines() == ["stopped: what read the output, as `head` does, has gone"]


def test_the_script_refuses_a_cluster_that_is_not_described() -> None:
    """All that is missing at once, each with what to type."""
    words = ["launch/plan.py", "stage=2", "model=qwen2_vl_7b"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"ConfigError: {len(NEEDED)} problems in this run")
    for name in NEEDED:
        assert f"cluster.{name}=null: a plan needs it" in done.stderr
    assert "-> try cluster.gpus=1024\n" in done.stderr
    assert "-> try cluster.inter_node_gb_s=50, or cluster=h100 or another group" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster.gpus=null"], "cluster.gpus=null: a plan needs it  -> try cluster.gpus=1024"),
        (["cluster.gpus=1000"], "1000 ranks must be a multiple of parallel.tp*pp = 8*8=64"),
        (["cluster.intra_node_gb_s=0"], "cluster.intra_node_gb_s=0.0 must be above 0"),
        (["cluster.link_efficiency=null"], "-> try cluster.link_efficiency=0.8, or cluster=h100"),
        (
            ["cluster.measured=[efficiency,speed]"],
            "cluster.measured=[efficiency,speed] may name efficiency, link_efficiency, latency_us"
            " or reserved_gib  -> try cluster.measured=[efficiency]",
        ),
        (["parallel.layout=[1,2]"], "must have parallel.pp=8 entries"),
        (["parallel.tp=3"], "parallel.tp=3 must divide"),
        (["train.global_batch_size=1000"], "must be a multiple of micro_batch_size*dp = 1*16=16"),
    ],
)
def test_refusals(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate_plan(config(*words))


def test_a_run_of_another_size_than_described_is_refused() -> None:
    words = ["init.allow_random=true", "cluster.gpus=4"]
    message = (
        "cluster.gpus=4 is not the number of ranks that were started, 2  -> try cluster.gpus=2"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(load_config(words), world_size=2)
    validate(load_config(words), world_size=4)


@pytest.mark.parametrize("cluster", ["h100", "h200", "a100"])
@pytest.mark.parametrize("model", ["qwen2_vl_2b", "qwen2_vl_7b"])
def test_shipped_clusters_describe_all_a_plan_needs(cluster: str, model: str) -> None:
    config = load_config([f"model={model}", f"cluster={cluster}", "cluster.gpus=64"])
    validate_plan(config)
    assert 0 < estimate(config).mfu < 1


def test_utilisation_is_model_flops_over_what_the_devices_could_do() -> None:
    plan = plan_of()
    flops = training_flops(plan.config.model, plan.shape.load, vit=True, adapter=True, llm=True)
    step = flops * plan.shape.num_microbatches * plan.shape.dp
    assert plan.mfu == pytest.approx(step / (plan.step_s * 1024 * 989e12))
    assert sum(plan.flops_per_token) * plan.shape.load.num_tokens == pytest.approx(flops)
    assert plan.days == pytest.approx(800e9 / (1024 * 8192 / plan.step_s) / 86400)


def test_recomputation_takes_time_and_no_utilisation_counts_it() -> None:
    without, with_it = plan_of(), plan_of("parallel.recompute.llm=full")
    assert with_it.flops_per_token == without.flops_per_token
    assert with_it.step_s > 1.2 * without.step_s


def test_a_frozen_tower_costs_its_forward_pass_only() -> None:
    vision, language = plan_of("stage=3").flops_per_token
    trained_vision, trained_language = plan_of("stage=2").flops_per_token
    assert vision < 0.45 * trained_vision
    assert language == pytest.approx(trained_language)


def test_the_bubble_is_that_of_the_simulated_schedule_and_near_the_ideal() -> None:
    """8 stages, 64 microbatches: 9.9 % where all are equal; whole layers leave 2.0 points more."""
    plan = plan_of()
    assert plan.ideal_bubble == pytest.approx(7 / 71)
    assert plan.ideal_bubble < plan.timeline.bubble < plan.ideal_bubble + 0.025


def test_the_split_counts_the_wait_of_the_vit() -> None:
    """At tp 8 the ViT waits longer than it computes; a split by FLOPs alone costs 8 points."""
    by_flops = estimate(config("parallel.layout=[8,10,10,11,11,11,10,9]"))
    assert plan_of().timeline.bubble < by_flops.timeline.bubble - 0.05


def test_waiting_for_tp_by_hand() -> None:
    """One 72B layer, tp 8 with sequence parallelism: a gather and a scatter before and after each
    of attention and MLP; backward, two of each six run beside a matrix product.
    """
    traffic = tensor_communication(config(), expected_load(config())).layer
    unit = 7 / 8 * 8192 * 8192 * 2
    assert (traffic.forward.bytes_sent, traffic.forward.exposed_bytes) == (4 * unit, 4 * unit)
    assert (traffic.backward.bytes_sent, traffic.backward.exposed_bytes) == (6 * unit, 2 * unit)
    frozen = config("stage=1")
    backward = tensor_communication(frozen, expected_load(frozen)).layer.backward
    assert (backward.bytes_sent, backward.exposed_bytes) == (4 * unit, 4 * unit)


def test_one_tp_rank_sends_nothing() -> None:
    alone = load_config(["model=qwen2_vl_2b", "cluster=h100", "cluster.gpus=8"])
    assert estimate(alone).tp.bytes_sent == 0
    assert estimate(alone).pp.bytes_sent == 0
    assert estimate(alone).dp.bytes_sent > 0


def test_links_follow_the_nodes() -> None:
    """450 and 50 GB/s by data sheet, of which 0.8 are reached; 8 ranks of a node share 8 ports."""
    cluster = config().cluster
    rates = [
        [link.bytes_per_s / 0.8e9 for link in (links.tp, links.pp, links.dp)]
        for links in (
            Links.of(cluster, tp=8, pp=8, dp=16),
            Links.of(cluster, tp=2, pp=1, dp=64),
            Links.of(cluster, tp=16, pp=1, dp=8),
            Links.of(cluster, tp=2, pp=2, dp=2),
        )
    ]
    assert rates == [[450, 50, 50], [450, 50, 200], [50, 50, 50], [450, 450, 450]]


def test_overlap_hides_what_replicas_exchange() -> None:
    whole = plan_of()
    reduced = plan_of("parallel.overlap.grad_reduce=true")
    both = plan_of("parallel.overlap.grad_reduce=true", "parallel.overlap.param_gather=true")
    assert whole.dp.exposed_s > reduced.dp.exposed_s > both.dp.exposed_s >= 0
    assert whole.dp.bytes_sent == both.dp.bytes_sent


def test_overlap_hides_what_the_layers_exchange_over_tp() -> None:
    """Latency is left, and what embedding, merger and head wait for."""
    layers = "parallel.layout=[10,10,10,10,10,10,10,10]"
    plain, overlapped = plan_of(layers), plan_of(layers, "parallel.overlap.tp_comm=true")
    assert 0 < overlapped.tp.exposed_s < plain.tp.exposed_s / 3
    assert overlapped.tp.bytes_sent == plain.tp.bytes_sent
    assert overlapped.mfu > plain.mfu


def test_deepspeed_sends_gradients_twice() -> None:
    """It all-reduces what the other one reduce-scatters: 8 + 2 bytes for 4 + 2 of a parameter."""
    deepspeed = plan_of("optimizer.zero=deepspeed")
    assert deepspeed.dp.bytes_sent == pytest.approx(plan_of().dp.bytes_sent * 10 / 6)


def test_the_best_layouts_fit_and_are_ordered() -> None:
    found = best_layouts(config(), count=8)
    assert len(found) == 8
    assert all(one.fits for one in found)
    assert [one.mfu for one in found] == sorted((one.mfu for one in found), reverse=True)
    assert found[0].mfu >= plan_of().mfu
    for one in found:
        validate_plan(one.config)


def test_nothing_fits_where_memory_is_short() -> None:
    small = config("cluster.gpus=8", "cluster.memory_gib=12")
    assert best_layouts(small, count=8) == []
    tiny = replace(plan_of(), config=config("cluster.memory_gib=12"))
    assert not tiny.fits
    assert "DOES NOT FIT" in report(tiny)


def test_the_closed_form_ranks_as_the_simulation_does() -> None:
    """Of 30 layouts in the closed form's order, the simulated best is among the first 8."""
    many, few = best_layouts(config(), count=30), best_layouts(config(), count=8)
    assert many[0].mfu == pytest.approx(few[0].mfu, rel=0.01)


def test_the_report_says_what_is_assumed() -> None:
    text = report(plan_of())
    assumed = next(line for line in text.splitlines() if line.startswith("assumed"))
    for name in ("efficiency", "link_efficiency", "latency_us", "reserved_gib"):
        assert f"cluster.{name}=" in assumed
    assert "data.vision_share=0.5" in assumed
    text = report(plan_of("cluster.measured=[efficiency]"))
    measured = next(line for line in text.splitlines() if line.startswith("measured"))
    assert "cluster.efficiency=" in measured
    assert "cluster.latency_us" not in measured


def test_the_first_lines_give_a_range_and_what_is_guessed() -> None:
    """Published runs of such models reach about 400 TFLOP/s on an H100, not the sum of the plan."""
    words = ["model=qwen2_vl_7b", "parallel=tp2", "cluster=h100", "cluster.gpus=8"]
    guessed = estimate(load_config(words))
    assert guessed.least_share * guessed.tflops_per_gpu < 400 < guessed.tflops_per_gpu
    measured = estimate(load_config([*words, "cluster.measured=[efficiency,latency_us]"]))
    assert guessed.least_share < measured.least_share == pytest.approx(0.9)
    first = report(measured).splitlines()[:5]
    tflops, per_second = measured.tflops_per_gpu, 512 * 8192 / measured.step_s / 8
    assert first[2].startswith(
        f"expected: {0.9 * tflops:.0f} to {tflops:.0f} TFLOP/s and "
        f"{0.9 * per_second:,.0f} to {per_second:,.0f} tokens/s per device"
    )
    assert first[3].startswith("guessed: cluster.link_efficiency, cluster.reserved_gib, ")
    assert first[4].startswith("left out: the optimizer's update")


def test_the_command_of_the_readme_shows_the_best_layout() -> None:
    [words] = re.findall(r"python launch/plan\.py (.*)", (ROOT / "README.md").read_text())
    shown = load_config(words.split())
    assert estimate(shown).mfu == best_layouts(shown, count=8)[0].mfu


def test_the_report_states_the_parameters_of_every_stage() -> None:
    plan = plan_of()
    text = report(plan)
    for held in plan.shards:
        assert f"{sum(piece.total for piece in held.values()):,}" in text


def test_usable_memory_is_what_is_not_reserved() -> None:
    assert usable_bytes(config("cluster.memory_gib=80", "cluster.reserved_gib=5")) == 75 * 2**30


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("vpp", [1, 2])
def test_a_picture_of_the_pipeline(suffix: str, vpp: int, tmp_path: Path) -> None:
    words = ["train.global_batch_size=256", f"parallel.vpp={vpp}"]
    path = draw_timeline(plan_of(*words), tmp_path / f"timeline.{suffix}")
    assert path.stat().st_size > 10_000


def test_pictures_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png, \.pdf or \.svg"):
        draw_timeline(plan_of(), tmp_path / "timeline.gif")
    with pytest.raises(ConfigError, match="is no folder"):
        draw_timeline(plan_of(), tmp_path / "nowhere" / "timeline.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the kernels of a CPU")
def test_check_prints_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([*BIG, "--check"])
    rows = capsys.readouterr().out.partition("Against one real rank")[2].splitlines()[3:]
    assert [row.split()[0] for row in rows] == ["0", "4", "7"]
    for row in rows:
        _, _, planned, counted, _, _, difference = row.split()
        assert planned == counted
        assert abs(float(difference.rstrip("%"))) < 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the kernels of a CPU")
def test_check_fails_where_a_formula_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_memory, "ROTARY_TABLES", 40)
    with pytest.raises(SystemExit, match="plan and rank disagree"):
        check.check(plan_of())
    monkeypatch.undo()
    monkeypatch.setattr(parameter_shards, "_vit_replicated", lambda _: 0)
    with pytest.raises(SystemExit, match="plan and rank disagree"):
        check.check(plan_of())

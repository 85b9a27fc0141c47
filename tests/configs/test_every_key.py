"""Every key of the schema does something: each is changed here, and something else changes.

Most keys show in what is computed without training: the plan that launch/plan.py prints, the
configuration of an exported model, the schedule of learning rates, a refusal. What only a run shows
is changed in a run of one process.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from triptych.checkpoints.hf.model_config import hf_config
from triptych.configs.compose import load_config
from triptych.configs.overrides import schema_keys
from triptych.configs.schema import Config, Kernels
from triptych.configs.validate import validate
from triptych.costs.estimate import estimate
from triptych.errors import ConfigError, TriptychError
from triptych.launch.planner.estimate_tables import report
from triptych.models.kernels import Installed, choose
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.runs import Runs, losses, metrics, train
from triptych.train.run import pretrain
from triptych.train.stages.stage import Stage

ROOT = Path(__file__).parents[2]
PLANNED = [  # a run that spans nodes and pipeline stages, so that everything costs something
    "model=qwen2_vl_7b",
    "parallel=tp2_pp2",
    "parallel.recompute.llm=selective",
    "cluster=h100",
    "cluster.gpus=64",
    "init.allow_random=true",
]
CHANGES_THE_PLAN = {
    "model.name": "other",
    "model.vision.depth": "30",
    "model.vision.hidden_size": "1344",
    "model.vision.num_heads": "20",
    "model.vision.intermediate_size": "4096",
    "model.vision.norm": "rmsnorm",
    "model.vision.mlp": "swiglu",
    "model.vision.patch_size": "16",
    "model.vision.temporal_patch_size": "4",
    "model.vision.spatial_merge_size": "4",
    "model.vision.window_size": "112",
    "model.language.hidden_size": "3456",
    "model.language.num_layers": "24",
    "model.language.num_heads": "24",
    "model.language.num_kv_heads": "2",
    "model.language.head_dim": "64",
    "model.language.intermediate_size": "16384",
    "model.language.vocab_size": "160000",
    "model.language.tie_word_embeddings": "true",
    "stage.name": "other",
    "stage.token_budget": "1000000",
    "stage.vit.train": "false",
    "stage.adapter.train": "false",
    "stage.llm.train": "false",
    "train.global_batch_size": "256",
    "train.micro_batch_size": "2",
    "train.seq_len": "16384",
    "train.precision": "fp32",
    "parallel.tp": "4",
    "parallel.pp": "4",
    "parallel.sequence_parallel": "false",
    "parallel.vpp": "2",
    "parallel.layout": "[12,16]",
    "parallel.recompute.vit": "full",
    "parallel.recompute.llm": "full",
    "parallel.recompute.modules": "[mlp]",
    "parallel.overlap.grad_reduce": "true",
    "parallel.overlap.param_gather": "true",
    "parallel.overlap.tp_comm": "true",
    "data.vision_share": "0.25",
    "data.image_patches": "256",
    "optimizer.zero": "deepspeed",
    "cluster.peak_tflops": "312",
    "cluster.efficiency.vit": "0.9",
    "cluster.efficiency.linear": "0.9",
    "cluster.efficiency.attention": "0.9",
    "cluster.efficiency.head": "0.9",
    "cluster.gpus": "128",
    "cluster.gpus_per_node": "1",
    "cluster.memory_gib": "40",
    "cluster.reserved_gib": "20",
    "cluster.intra_node_gb_s": "100",
    "cluster.inter_node_gb_s": "10",
    "cluster.link_efficiency": "0.4",
    "cluster.latency_us": "500",
    "cluster.measured": "[efficiency]",
}
CHANGES_THE_EXPORT = {
    "model.language.rms_norm_eps": "1e-5",
    "model.language.rope_theta": "1e4",
    "model.language.mrope_section": "[32,16,16]",
    "model.language.max_position_embeddings": "4096",
    "model.tokens.im_end": "150999",
    "model.tokens.vision_start": "150999",
    "model.tokens.vision_end": "150999",
    "model.tokens.image_pad": "150999",
    "model.tokens.video_pad": "150999",
}
CHANGES_THE_SCHEDULE = {"stage.horizon": "run"} | {
    f"stage.{part}.{key}": value
    for part in ("vit", "adapter", "llm")
    for key, value in {"lr": "1e-4", "min_lr": "1e-6", "warmup": "0.5", "decay": "linear"}.items()
}
IS_REFUSED = {
    "model.vision.full_attention_layers": "[1]",
    "model.tokens.endoftext": "-1",
    "model.tokens.im_start": "-1",
    "parallel.overlap.p2p": "true",
    "data.tokenizer": "nowhere",
    "data.evaluation": "[nowhere]",
    "data.sources": "{mine:{path:nowhere}}",
    "data.mixtures": "{stage2:{}}",
    "data.generate": "false",
    "data.order": "nowhere",
    "data.root": "''",
    "data.video.fps": "0",
    "data.video.min_frames": "17",
    "data.video.max_frames": "3",
    "data.video.min_pixels": "30000",
    "data.video.max_pixels": "783",
    "data.video.max_tokens": "7",
    "init.checkpoint": "nowhere",
    "init.language": "nowhere",
    "init.vision": "nowhere",
    "init.optimizer_state": "true",
    "init.allow_random": "false",
    "resume": "nowhere",
}
"""Words for the debug model, with what ``TOGETHER_WITH`` adds."""
TOGETHER_WITH = {
    "data.tokenizer": ["data.generate=false"],
    "data.sources": ["data.generate=false"],
    "data.generate": ["data.root=nowhere"],
    "data.oversize": ["train.seq_len=40"],
    "run.keep": ["run.checkpoint_every=1"],
    "run.keep_every": ["run.checkpoint_every=1", "run.keep=1"],
    "train.validation_packs": ["train.validate_every=1"],
    "data.validation": ["train.validate_every=1"],
}
BRIEF = ("train.num_steps=3", *(f"stage.{part}.warmup=0" for part in ("vit", "adapter", "llm")))
CHANGES_A_RUN = {
    "train.num_steps": "1",
    "train.validate_every": "1",
    "train.validation_packs": "1",
    "train.profile": "2..2",
    "data.validation": "{chat:1.0}",
    "data.min_pixels": "3136",
    "data.max_pixels": "12544",
    "data.max_patches": "200",
    "data.window": "32",
    "data.weigh_by": "tokens",
    "data.oversize": "error",
    "optimizer.beta1": "0.5",
    "optimizer.beta2": "0.5",
    "optimizer.eps": "1e-2",
    "optimizer.weight_decay": "10.0",
    "optimizer.clip_grad": "0.1",
    "run.checkpoint_every": "1",
    "run.save_every_minutes": "1e-9",
    "run.keep": "1",
    "run.keep_every": "1",
    "run.weights_every": "2",
    "log.every": "5",
    "log.tensorboard": "true",
    "seed": "1",
}
SHOWN_ELSEWHERE = {
    "train.evaluate_every": "tests/train/test_evaluation.py",
    "train.evaluation_questions": "tests/train/test_evaluation.py",
    "train.kernels": "test_kernels_are_chosen",
    "train.deterministic": "test_a_deterministic_run_is_one_from_its_beginning",
    "cluster.timeout_s": "test_groups_have_the_timeout",
    "cluster.hang_s": "tests/train/test_watchdog.py",
    "run.dir": "test_a_run_writes_where_it_is_told",
    "data.accept_new_plan": "tests/train/test_resume.py",
    "log.wandb": "tests/train/test_hooks.py",
    "log.wandb_mode": "tests/train/test_hooks.py",
    "log.wandb_project": "tests/train/test_hooks.py",
    "log.wandb_name": "tests/train/test_hooks.py",
    "log.wandb_group": "tests/train/test_hooks.py",
    "log.wandb_tags": "tests/train/test_hooks.py",
    "train.spikes.action": "tests/train/test_gone_wrong.py",
    "train.spikes.sigmas": "tests/train/test_gone_wrong.py",
    "train.spikes.window": "tests/train/test_gone_wrong.py",
    "data.requests_per_s": "tests/data/test_oss.py",
    "data.max_unreadable": "tests/train/test_unreadable_budget.py",
    "data.max_unreadable_in_a_row": "tests/train/test_unreadable_budget.py",
    "data.cache.folder": "tests/data/test_frame_cache.py",
    "data.cache.max_gb": "tests/data/test_frame_cache.py",
    "data.num_workers": "tests/data/test_loader.py",
    "data.prefetch_steps": "tests/data/test_loader.py",
}
"""Key -> the test of this file, or the file whose tests change it and see the effect."""


def test_no_key_is_left_out() -> None:
    tables = (CHANGES_THE_PLAN, CHANGES_THE_EXPORT, CHANGES_THE_SCHEDULE, IS_REFUSED)
    shown = [key for table in (*tables, CHANGES_A_RUN, SHOWN_ELSEWHERE) for key in table]
    assert sorted(shown) == sorted(schema_keys())
    for key, place in SHOWN_ELSEWHERE.items():
        text = (ROOT / place).read_text() if "/" in place else Path(__file__).read_text()
        assert key.rpartition(".")[2] in text
        assert "/" in place or f"def {place}(" in text


def planned(config: Config) -> str:
    return report(estimate(config))


def exported(config: Config) -> dict[str, Any]:
    return hf_config(config.model)


def scheduled(config: Config) -> list[dict[str, float]]:
    config.train.num_steps = 5
    stage = Stage(config)
    return [stage.learning_rates(stage.token_budget * i // 10, i) for i in range(11)]


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        *((key, value, planned) for key, value in CHANGES_THE_PLAN.items()),
        *((key, value, exported) for key, value in CHANGES_THE_EXPORT.items()),
        *((key, value, scheduled) for key, value in CHANGES_THE_SCHEDULE.items()),
    ],
)
def test_changes_what_is_computed(key: str, value: str, seen: Callable[[Config], Any]) -> None:
    assert seen(load_config([*PLANNED, f"{key}={value}"])) != unchanged(seen)


@cache
def unchanged(seen: Callable[[Config], Any]) -> Any:
    return seen(load_config(PLANNED))


@pytest.mark.parametrize(("key", "value"), IS_REFUSED.items())
def test_is_refused(key: str, value: str) -> None:
    more = TOGETHER_WITH.get(key, [])
    with pytest.raises(ConfigError, match=f"{re.escape(key)}|nowhere"):
        validate(load_config([*more, f"{key}={value}"]), world_size=1)


@pytest.fixture(scope="module")
def base_outcomes() -> dict[tuple[str, ...], Any]:
    """What runs without a change did, by the words they were given."""
    return {}


@pytest.mark.distributed
@pytest.mark.parametrize(("key", "value"), CHANGES_A_RUN.items())
def test_changes_a_run(pool, digits, tmp_path, base_outcomes, key: str, value: str) -> None:
    common = (*BRIEF, *TOGETHER_WITH.get(key, []))
    if common not in base_outcomes:
        base_outcomes[common] = outcome(Runs(pool, digits, tmp_path), "base", common)
    changed = outcome(Runs(pool, digits, tmp_path), "changed", (*common, f"{key}={value}"))
    assert changed != base_outcomes[common]


def outcome(runs: Runs, name: str, words: tuple[str, ...]) -> Any:
    """What a run leaves behind, or why it stops."""
    try:
        told = runs.call(told_or_refused, name, "single", *words)[0]
    except TriptychError as error:
        return str(error)
    folder = runs.dir(name)
    if not (folder / "metrics.jsonl").exists():
        return told
    files = {re.sub(r"\d{6,}\S*|-\w{8}$", "", path.name) for path in folder.rglob("*")}
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    validation = [line.get("validation_loss") for line in metrics(folder)]
    num_lines = told.count(" | loss ")
    return losses(folder), validation, files, checkpoints, num_lines


def told_or_refused(config: Config) -> str:
    try:
        return train(config)
    except TriptychError as error:
        return f"{type(error).__name__}: {error}"


def test_kernels_are_chosen() -> None:
    everything = Installed(True, frozenset({"flash_attn", "liger_kernel"}), True)
    precision = load_config(["train.precision=bf16"]).train.precision
    tables = [choose(kernels, precision, everything) for kernels in Kernels]
    assert tables[0] != tables[1]


def test_a_deterministic_run_is_one_from_its_beginning(monkeypatch) -> None:
    """NCCL and cuBLAS look once."""
    told: list[str] = []

    def begin(*_: object) -> None:
        told.append("process group")
        raise InterruptedError

    monkeypatch.setattr("triptych.train.run.be_deterministic", lambda: told.append("deterministic"))
    monkeypatch.setattr("triptych.train.run.init_distributed", begin)
    for words in ([], ["train.deterministic=true"]):
        with pytest.raises(InterruptedError):
            pretrain(load_config(words))
    assert told == ["process group", "deterministic", "process group"]


@pytest.mark.distributed
def test_groups_have_the_timeout(pool) -> None:
    assert pool(2).run(group_timeout_s, timeout_s=120.0, seconds=60) == [60.0, 60.0]
    assert pool(2).run(group_timeout_s, timeout_s=120.0, seconds=600) == [600.0, 600.0]


def group_timeout_s(seconds: int) -> float:
    import torch

    mesh = build_mesh(2, 1, seed=0, timeout_s=seconds)
    backend: Any = mesh.tp_group._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


@pytest.mark.distributed
def test_a_run_writes_where_it_is_told(pool, digits, tmp_path) -> None:
    runs = Runs(pool, digits, tmp_path)
    runs.train("here", "single", "train.num_steps=1")
    assert (tmp_path / "here" / "metrics.jsonl").exists()

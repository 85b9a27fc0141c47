"""What trains, what it starts from, and what is logged and kept of it."""

import re
from collections.abc import Iterator
from pathlib import Path

from triptych.configs.problems import Problem, either, from_hub, typed_list
from triptych.configs.schema import PARTS, Config, Recompute

NOT_IN_WANDB_PROJECT = "/\\#?%:"
WANDB_MODES = ("online", "offline", "disabled")
MAX_WANDB_NAME, MAX_WANDB_TAG = 128, 64
"""Characters that W&B takes."""
MAX_PROFILED = 20
"""Steps: a trace takes megabytes for each, all of them in memory until it is written."""
STARTS = {
    "checkpoint": "the folder of a run, of one of its checkpoints, or that launch/convert.py "
    "import wrote",
    "language": "the folder of a Qwen2 or Qwen2.5 text model",
    "vision": "the folder of a CLIP ViT, a Qwen2-VL or a Qwen2.5-VL model",
}
"""Keys of ``init`` that name a folder -> which."""
RECOMPUTABLE = ("core_attn", "mlp")


def check_stage(config: Config) -> Iterator[Problem]:
    """Something trains, and what trains has a learning rate."""
    parts = {f"stage.{name}": getattr(config.stage, name) for name in PARTS}
    trained = {key: part for key, part in parts.items() if part.train}
    if not trained:
        flags = ", ".join(f"{key}.train=false" for key in parts)
        yield Problem(f"{flags}: nothing trains", "stage.llm.train=true")
    for key, part in trained.items():
        if part.lr <= 0:
            yield Problem(
                f"{key}.lr={part.lr} must be above 0 where {key}.train=true",
                f"{key}.lr=1e-5 or {key}.train=false",
            )
        elif not 0 <= part.min_lr <= part.lr:
            yield Problem(
                f"{key}.min_lr={part.min_lr} must be from 0 to {key}.lr={part.lr}",
                f"{key}.min_lr={part.lr / 10}",
            )
        if not 0 <= part.warmup <= 1:
            yield Problem(
                f"{key}.warmup={part.warmup} is a share of the token budget, from 0 to 1",
                f"{key}.warmup=0.01",
            )


def check_start(config: Config) -> Iterator[Problem]:
    """There are weights to start from, unless random ones are asked for."""
    init, resume = config.init, config.resume
    if not resume:
        yield Problem("resume is empty", "resume=auto, resume=never or a path")
        return
    if resume not in ("auto", "never"):
        if not Path(resume).exists():
            yield Problem(f"resume={resume} does not exist", "resume=auto, resume=never or a path")
        return
    yield from _check_weights(config)
    if init.checkpoint is None and init.optimizer_state:
        yield Problem(
            "init.optimizer_state=true needs init.checkpoint to take it from",
            "init.checkpoint=PATH or init.optimizer_state=false",
        )
    resumes = resume == "auto" and (Path(config.run.dir) / "checkpoints").exists()
    for key, remedy in STARTS.items():
        path = getattr(init, key)
        if path == "":
            yield Problem(f"init.{key} is empty", f"init.{key}=PATH, or init.{key}=null for none")
        elif path is not None and not resumes and not Path(path).exists():
            yield Problem(f"init.{key}={path} does not exist", remedy + from_hub(path))


def _check_weights(config: Config) -> Iterator[Problem]:
    """Each tower has one place that its weights come from."""
    init = config.init
    parts = {"init.language": init.language, "init.vision": init.vision}
    given = [key for key, path in parts.items() if path is not None]
    if given and init.checkpoint is not None:
        yield Problem(
            f"init.checkpoint={init.checkpoint} and {given[0]}={parts[given[0]]} both give weights",
            f"{given[0]}=null or init.checkpoint=null",
        )
    if init.checkpoint is not None or init.allow_random or len(given) == len(parts):
        return
    if not given:
        yield Problem(
            f"init.checkpoint=null leaves model.name={config.model.name} without weights",
            "init.checkpoint=PATH, or init.language=PATH with init.vision=PATH, or "
            "init.allow_random=true to start from random weights",
        )
        return
    missing = next(key for key in parts if key not in given)
    tower = {"init.language": "language model", "init.vision": "ViT"}[missing]
    yield Problem(
        f"{missing}=null leaves the {tower} without weights",
        f"{missing}=PATH, or init.allow_random=true to start it from random weights",
    )


def check_hooks(config: Config) -> Iterator[Problem]:
    """Where the run writes, and what it logs to."""
    if not config.run.dir:
        yield Problem("run.dir is empty", "run.dir=FOLDER")
    project = config.log.wandb_project
    if not project or set(project) & set(NOT_IN_WANDB_PROJECT):
        yield Problem(
            f"log.wandb_project={project} must be a name without any of {NOT_IN_WANDB_PROJECT}",
            "log.wandb_project=triptych",
        )
    if config.log.wandb_mode not in WANDB_MODES:
        yield Problem(
            f"log.wandb_mode={config.log.wandb_mode} must be {either(WANDB_MODES)}",
            "log.wandb_mode=offline",
        )

    for key in ("wandb_name", "wandb_group"):
        name = getattr(config.log, key)
        if name is not None and not 1 <= len(name) <= MAX_WANDB_NAME:
            yield Problem(
                f"log.{key} has {len(name)} characters; W&B takes 1 to {MAX_WANDB_NAME}",
                f"log.{key}=null or a shorter one",
            )
    for tag in config.log.wandb_tags:
        if not 1 <= len(tag) <= MAX_WANDB_TAG:
            yield Problem(
                f"log.wandb_tags has one of {len(tag)} characters; W&B takes 1 to {MAX_WANDB_TAG}",
                "log.wandb_tags=[mine,ablation]",
            )


def profiled_steps(text: str | None) -> tuple[int, int] | None:
    """First and last step of ``train.profile``; None where it names none, or makes no sense."""
    found = re.fullmatch(r"(\d{1,15})\.\.(\d{1,15})", text or "")
    steps = (int(found[1]), int(found[2])) if found else (0, 0)
    return steps if 1 <= steps[0] <= steps[1] else None


def check_profile(config: Config) -> Iterator[Problem]:
    """Few steps are profiled."""
    profile = config.train.profile
    if profile is None:
        return
    steps = profiled_steps(profile)
    if steps is None:
        yield Problem(
            f"train.profile={profile} must be the first and the last step", "train.profile=20..22"
        )
    elif steps[1] - steps[0] >= MAX_PROFILED:
        yield Problem(
            f"train.profile={profile} must be {MAX_PROFILED} steps at most",
            f"train.profile={steps[0]}..{steps[0] + 2}",
        )


def check_recompute(config: Config) -> Iterator[Problem]:
    """What is recomputed exists."""
    if config.parallel.recompute.vit is Recompute.selective:
        yield Problem(
            "parallel.recompute.vit=selective must be none or full", "parallel.recompute.vit=full"
        )
    modules = config.parallel.recompute.modules
    known = [module for module in modules if module in RECOMPUTABLE]
    if not modules or known != modules:
        yield Problem(
            f"parallel.recompute.modules={typed_list(modules)} must name {either(RECOMPUTABLE)},"
            " or both",
            f"parallel.recompute.modules={typed_list(known or RECOMPUTABLE[:1])}",
        )

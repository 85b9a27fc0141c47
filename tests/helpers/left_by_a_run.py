"""A run folder such as training leaves it, without training: for what reads one."""

import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

from PIL import Image

from triptych.checkpoints.layout import CHECKPOINTS
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.compose import load_config, save_config
from triptych.parallel.agree import SingleProcess

BEGAN = datetime(2026, 11, 28, 12, tzinfo=UTC)
STEP_S, BETWEEN_S, STOPPED_S = 1.0, 0.5, 3600.0


def leave_run(
    run_dir: Path,
    *,
    num_steps: int,
    stage: str = "stage2",
    lr: str = "1e-3",
    tokens_per_step: int = 8000,
    hours: float = 0.0,
) -> Path:
    """A run that was killed in the middle, an hour later went on, and is not finished.

    Args:
        run_dir: is made.
        num_steps: so far.
        stage: of the run.
        lr: of the language model.
        tokens_per_step: without padding.
        hours: how much later than others it began.
    """
    run_dir.mkdir(parents=True)
    words = [f"stage={stage.removeprefix('stage')}", "train.num_steps=1000", f"stage.llm.lr={lr}"]
    words.append("stage.token_budget=20000000")
    save_config(load_config(words), run_dir / "config.yaml")
    environment = {"git": {"commit": "4d276d6b6c95"}, "host": "node7", "device": "cpu"}
    environment |= {"layout": "tp=1 pp=1 dp=2", "packages": {"torch": "2.13.0"}}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    began = BEGAN + timedelta(hours=hours)
    again = num_steps // 2
    lines = [_line(n, stage, began, again, tokens_per_step) for n in range(1, num_steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _leave_events(run_dir, began, again)
    if num_steps > 100:
        _leave_more(run_dir)
    return run_dir


def _line(
    step: int, stage: str, began: datetime, again: int, tokens_per_step: int
) -> dict[str, object]:
    ended = step * (STEP_S + BETWEEN_S) + STOPPED_S * (step > again)
    noise = math.sin(37.0 * step) * 0.1
    line: dict[str, object] = {
        "step": step,
        "time": (began + timedelta(seconds=ended)).isoformat(timespec="milliseconds"),
        "stage": stage,
        "loss": (2.0 + noise) * step**-0.2,
        "grad_norm": 1.0 + 4.0 / step + noise,
        "lr": {"vit": 1e-3 / step, "adapter": 2e-3 / step, "llm": 2e-3 / step},
        "num_tokens": tokens_per_step,
        "num_patches": 3000 + step % 7,
        "num_unreadable": int(step in (7, 9)),
        "consumed_tokens": step * tokens_per_step,
        "consumed_samples": 30 * step,
        "step_time_s": STEP_S,
        "data_s": 0.1 * STEP_S,
        "compute_s": 0.9 * STEP_S,
        "tokens_per_s": tokens_per_step * (1 + noise) / STEP_S,
        "flops": 1e12,
        "flops_per_s": 1e12,
        "mfu": 0.38 + 0.1 * noise,
        "imbalance": 1.002 + 0.01 * noise,
        "left_s": 1.5 * (1000 - step),
        "fill": 0.99 + 0.05 * noise,
        "host_memory_bytes": 2**31 + step * 2**18,
        "device_memory_bytes": None,
        "anything": 3.0,
    }
    if step % 50:
        return line
    loss = 2.1 * step**-0.19
    return line | {
        "validation_loss": loss,
        "validation_loss_by_source": {"strings": 0.9 * loss, "captions": 1.1 * loss},
        "accuracy": {"strings": 1 - 1 / step, "captions": 0.5},
    }


def _leave_events(run_dir: Path, began: datetime, again: int) -> None:
    resumed = STOPPED_S + again * (STEP_S + BETWEEN_S)
    killed = again + 20
    told = [
        (0.1, "started", 0, {"begun": began.timestamp(), "hosts": ["node7"], "world_size": 2}),
        (2.0, "first_step", 1, {"seconds": 1.5}),
        (30.0, "update_skipped", 20, {"reason": "gradient norm nan", "packs": [81, 82]}),
        (80.0, "straggler", 50, {"ranks": [2, 5], "cause": "data", "host": "node7"}),
        (resumed, "died", killed, {"last_seen": began.timestamp() + 1.5 * killed}),
        (resumed + 0.1, "started", again, {"hosts": ["node8"], "world_size": 2}),
        (resumed + 2.0, "first_step", again + 1, {"seconds": 1.4}),
        (resumed + 90, "saved", again + 50, {"stall_s": 0.01, "seconds": 2.0}),
    ]
    events = [
        {"time": began.timestamp() + seconds, "what": what, "step": step, **details}
        for seconds, what, step, details in told
    ]
    (run_dir / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def _leave_more(run_dir: Path) -> None:
    """Checkpoints, one of them damaged, unreadable samples and sheets of answers."""
    for step in (100, 200):
        store = CheckpointStore(run_dir / CHECKPOINTS, SingleProcess())
        writer = store.begin(step)
        (writer.folder.shards / "rank_00000.bin").write_bytes(bytes(3_000_000))
        writer.commit({"stage": "stage2", "layout": "tp=1 pp=1 dp=2", "proven": step < 200})
    damaged = run_dir / CHECKPOINTS / "step_000000100.0"
    damaged.rename(damaged.with_name(f"{damaged.name}.damaged"))
    (run_dir / "quarantine").mkdir()
    with (run_dir / "quarantine" / "dp_00000.jsonl").open("w") as file:
        for step in (7, 9):
            told = {"step": step, "name": "strings", "cause": "missing", "reason": "No such file"}
            file.write(json.dumps(told) + "\n")
    (run_dir / "evaluation").mkdir()
    for step, width in ((100, 500), (200, 600)):
        picture = Image.effect_noise((width, 200), 60)
        picture.save(run_dir / "evaluation" / f"step_{step:09d}.png")

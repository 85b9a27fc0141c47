"""What a page says of a run in words: where it stands, how fast, what befell it, what differs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from triptych.launch.reporting.axis import compact
from triptych.launch.reporting.run_record import RunRecord
from triptych.launch.reporting.time_spent import time_shares
from triptych.train.console import duration
from triptych.train.restarts import effective_share, read_starts, steps_trained_again

RECENT_STEPS = 100
"""What "now" means: of these the rates are medians, and the loss a mean."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A key of the configuration that runs set otherwise."""

    key: str
    values: list[str]
    """One for each run."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a run's time."""

    what: str
    percent: float
    duration: str


def facts(run: RunRecord, now: datetime) -> dict[str, str]:
    """Name -> what is to be said, in the order of interest."""
    steps = run.steps
    if not len(steps):
        return {"Steps": "none yet: there is no metrics.jsonl, or nothing in it"}
    recent = slice(-RECENT_STEPS, None)
    samples, unreadable = steps.last("consumed_samples"), np.nansum(steps["num_unreadable"])
    skipped = int((np.isnan(steps["loss"]) | np.isnan(steps["grad_norm"])).sum())
    told = {
        "Last step": _last_step(run, now),
        "Steps": _of(steps.last("step"), run.config.get("train.num_steps")),
        "Left": _left(run),
        "Tokens": _of(steps.last("consumed_tokens"), run.config.get("stage.token_budget")),
        "Loss": _recent_loss(run),
        "Validation loss": _validation(run),
        "Speed": f"{_middle(run, 'tokens_per_s', recent)} tokens/s, "
        f"{_middle(run, 'step_time_s', recent)} s/step",
        "Work": f"{_middle(run, 'flops_per_s', recent)} FLOP/s of the model",
        "MFU": _mfu(run, recent),
        "Fill": f"{np.nanmean(steps['fill']):.4f}" if "fill" in steps.names else "",
        "Imbalance": f"{np.nanmean(steps['imbalance']):.4f}" if "imbalance" in steps.names else "",
        "Starts": _starts(run),
        "Steps without update": f"{skipped:,}" if skipped else "",
        "Unreadable": f"{unreadable:,.0f} of {samples:,.0f} samples" if samples else "",
        "Ran as": ", ".join(
            run.environment[key] for key in ("layout", "device", "host") if key in run.environment
        ),
        "Commit": run.environment.get("git commit", "")[:12],
    }
    return {name: text for name, text in told.items() if text}


def progress(run: RunRecord) -> float | None:
    """Percent of the token budget, or of the steps where these are capped; None if unknown."""
    done = [
        (run.steps.last(name) or 0.0) / budget
        for name, key in (("consumed_tokens", "stage.token_budget"), ("step", "train.num_steps"))
        if (budget := _positive(run.config.get(key)))
    ]
    return round(min(100.0, 100 * max(done)), 1) if done and len(run.steps) else None


def shares(run: RunRecord) -> list[Share]:
    """The parts of a run's time."""
    spent = time_shares(run) if len(run.steps) else {}
    total = sum(spent.values())
    return [
        Share(what, round(100 * seconds / total, 2), duration(seconds))
        for what, seconds in spent.items()
        if total
    ]


def differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """The keys that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [Difference(key, [run.config.get(key, "none") for run in runs]) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def _last_step(run: RunRecord, now: datetime) -> str:
    ended = run.steps.last("time")
    if ended is None:
        return "at an unknown time"
    then = datetime.fromtimestamp(ended).astimezone()
    return f"{then:%Y-%m-%d %H:%M:%S}, {duration(max(0.0, now.timestamp() - ended))} ago"


def _left(run: RunRecord) -> str:
    """As the newest step told it."""
    left = run.steps["left_s"][-1]
    return duration(left) if np.isfinite(left) and left > 0 else ""


def _of(done: float | None, whole: str | None) -> str:
    """As "1,237 of 2,000"."""
    if done is None:
        return ""
    budget = _positive(whole)
    numbers = [done] if budget is None else [done, budget]
    return " of ".join(compact(n) if n >= 1e7 else f"{n:,.0f}" for n in numbers)


def _positive(text: str | None) -> float | None:
    """The number that a key holds, above 0; None where it holds none."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 < number < np.inf else None


def _recent_loss(run: RunRecord) -> str:
    losses = run.steps["loss"][np.isfinite(run.steps["loss"])][-RECENT_STEPS:]
    if not len(losses):
        return "none"
    return f"{losses.mean():.4f}, mean of {len(losses)} steps; last {losses[-1]:.4f}"


def _validation(run: RunRecord) -> str:
    losses = run.steps["validation_loss"]
    if not np.isfinite(losses).any():
        return ""
    best = int(np.nanargmin(losses))
    last = run.steps.last("validation_loss")
    return f"{last:.4f}; lowest {losses[best]:.4f} at step {run.steps['step'][best]:,.0f}"


def _middle(run: RunRecord, name: str, recent: slice) -> str:
    values = run.steps[name][recent]
    return compact(float(np.nanmedian(values))) if np.isfinite(values).any() else "unknown"


def _mfu(run: RunRecord, recent: slice) -> str:
    values = run.steps["mfu"][recent]
    if np.isfinite(values).any():
        return f"{100 * np.nanmedian(values):.1f} %"
    return ""


def _starts(run: RunRecord) -> str:
    """Of all starts, and what they cost until the last step or event."""
    try:
        starts = read_starts(run.events)
        if not starts:
            return ""
        last = max(run.steps.last("time") or 0.0, float(run.events[-1]["time"]))
        share = effective_share(starts, last, int(run.steps.last("step") or 0))
        return (
            f"{len(starts):,}; {steps_trained_again(starts):,} steps trained again, "
            f"effective training time {share:.1%}"
        )
    except (KeyError, TypeError, ValueError, AttributeError):  # whatever a flipped bit has made
        return "unknown: events.jsonl is damaged"

"""How often a run was started, what that cost, and whether it gets on: from ``events.jsonl`` alone.

started   from a step, by a process that began at a time
first_step, saved, ...
stopped, finished, interrupted   how it ended, where it could tell
died      where it could not: found by the start after it, from what it had left
gave_up   no further start without a person
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

ENDS_OF_ITSELF = ("stopped", "finished", "interrupted")
"""Somebody or something asked for it, or all was done."""


@dataclass(frozen=True, slots=True)
class PastStart:
    """One start of a run, and what became of it."""

    step: int
    """From which it went on."""
    begun: float
    """When its main process began; Unix time, as all times here."""
    hosts: tuple[str, ...]
    """In the order of their ranks."""
    world_size: int
    reached: int
    """The last step that it is known to have finished."""
    ended: float
    """When it was last known to train."""
    trains_since: float | None = None
    """When its first step was finished; what was before is start-up."""
    end: str | None = None
    """The event that ended it; None while it runs, or was not seen to end."""
    suspects: tuple[str, ...] = ()
    """Hosts of the ranks that failed first, or that left no word where others did."""


def read_starts(events: Sequence[Mapping[str, Any]]) -> list[PastStart]:
    """All starts, oldest first."""
    starts: list[PastStart] = []
    for event in events:
        if event["what"] == "started":
            starts.append(_start_of(event))
        elif starts:
            starts[-1] = _after(starts[-1], event)
    return starts


def _start_of(event: Mapping[str, Any]) -> PastStart:
    return PastStart(
        step=event["step"],
        begun=event.get("begun", event["time"]),
        hosts=tuple(event.get("hosts", ())),
        world_size=event.get("world_size", 1),
        reached=event["step"],
        ended=event["time"],
    )


def _after(start: PastStart, event: Mapping[str, Any]) -> PastStart:
    what, step, time = event["what"], event["step"], event["time"]
    if what in (*ENDS_OF_ITSELF, "died"):
        time = event.get("last_seen", time)
        suspects = tuple(event.get("suspects", ()))
        start = replace(start, end=what, suspects=suspects)
    elif what == "first_step":
        start = replace(start, trains_since=time)
    if start.end is not None and start.end != what:
        return start  # told by the start after it
    return replace(start, reached=max(start.reached, step), ended=max(start.ended, time))


def steps_trained_again(starts: Sequence[PastStart]) -> int:
    """Steps that were lost with one start and made once more by the next."""
    return sum(max(0, before.reached - after.step) for before, after in pairwise(starts))


def effective_share(starts: Sequence[PastStart], now: float, step: int) -> float:
    """The share of the time since the first start that went into steps that count.

    Start-up with its first step does not count, nor do steps that were trained again and the time
    in which nothing ran. A save's stall does.

    Args:
        starts: at least one.
        now: Unix time.
        step: where the run stands, or from where it goes on.
    """
    elapsed = now - starts[0].begun
    next_steps = [*(start.step for start in starts[1:]), step]
    effective = sum(
        _kept_s(start, next_step) for start, next_step in zip(starts, next_steps, strict=True)
    )
    return min(1.0, effective / elapsed) if elapsed > 0 else 1.0


def _kept_s(start: PastStart, next_step: int) -> float:
    """Seconds of the steps after the first that the next start took over."""
    num_steps = start.reached - start.step - 1
    if start.trains_since is None or num_steps <= 0:
        return 0.0
    num_kept = max(0, min(start.reached, next_step) - start.step - 1)
    return max(0.0, start.ended - start.trains_since) * num_kept / num_steps


def starts_without_progress(events: Sequence[Mapping[str, Any]], step: int) -> list[PastStart]:
    """The last starts that all went on from ``step``, where the next one would begin too.

    They trained and saved nothing that lasted. Where one of them ended because it was asked to,
    only those after it count; so it is after a run gave up and a person let it go on.
    """
    gave_up = [i for i, event in enumerate(events) if event["what"] == "gave_up"]
    recent = read_starts(events[gave_up[-1] + 1 :] if gave_up else events)
    stuck = takewhile(
        lambda start: start.step == step and start.end not in ENDS_OF_ITSELF, reversed(recent)
    )
    return list(stuck)[::-1]

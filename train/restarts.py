"""How often a run was started, what that cost, and whether it gets on: from ``events.jsonl`` alone.

started   from a step, by a process that began at a time
first_step, saved, ...
went_back from a step to an earlier one, without ending; on with the same data, or past it
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
class Stretch:
    """Steps one after the other, up to where a start ended or the run went back to before them."""

    step: int
    """From which it went on."""
    reached: int
    """The last step that it is known to have finished."""
    ended: float
    """When it was last known to train; Unix time, as all times here."""
    timed_step: int
    trains_since: float | None = None
    """When ``timed_step`` was finished. What was before is start-up; None where all was."""
    is_passed_over: bool = False
    """The run went back from its end, and on with the data after it."""


@dataclass(frozen=True, slots=True)
class PastStart:
    """One start of a run, and what became of it."""

    begun: float
    """When its main process began."""
    hosts: tuple[str, ...]
    """In the order of their ranks."""
    world_size: int
    stretches: tuple[Stretch, ...]
    """At least one; one more for each time that the run went back."""
    end: str | None = None
    """The event that ended it; None while it runs, or was not seen to end."""
    suspects: tuple[str, ...] = ()
    """Hosts of the ranks that failed first, or that left no word where others did."""

    @property
    def step(self) -> int:
        """From which it went on."""
        return self.stretches[0].step

    @property
    def reached(self) -> int:
        """The step at which it ended, or stands."""
        return self.stretches[-1].reached

    @property
    def ended(self) -> float:
        """When it was last known to train."""
        return self.stretches[-1].ended

    @property
    def trains_since(self) -> float | None:
        """When its first step was finished."""
        return self.stretches[0].trains_since

    @property
    def batches_on(self) -> int:
        """How many batches after those of ``step`` in the data it ended; below 0 before them."""
        batches = self.reached - self.step
        for before, after in pairwise(self.stretches):
            if before.is_passed_over:
                batches += before.reached - after.step
        return batches


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
    step, time, world_size = event["step"], event["time"], event.get("world_size")
    return PastStart(
        begun=_number(event.get("begun"), time),
        hosts=_texts(event.get("hosts")),
        world_size=world_size if isinstance(world_size, int) else 1,
        stretches=(Stretch(step=step, reached=step, ended=time, timed_step=step),),
    )


def _after(start: PastStart, event: Mapping[str, Any]) -> PastStart:
    what, time = event["what"], event["time"]
    if what in (*ENDS_OF_ITSELF, "died"):
        time = _number(event.get("last_seen"), time)
        start = replace(start, end=what, suspects=_texts(event.get("suspects")))
    if start.end is not None and start.end != what:
        return start  # told by the start after it
    *before, last = start.stretches
    last = replace(last, reached=max(last.reached, event["step"]), ended=max(last.ended, time))
    if what == "first_step":
        last = replace(last, timed_step=event["step"], trains_since=time)
    if what == "went_back" and isinstance(event.get("to_step"), int):
        before.append(replace(last, is_passed_over=event.get("passed_over") is True))
        step = event["to_step"]
        last = Stretch(step=step, reached=step, ended=time, timed_step=step, trains_since=time)
    return replace(start, stretches=(*before, last))


def _number(value: object, default: float) -> float:
    """The value, but where a flipped bit has made something else of it."""
    return value if isinstance(value, int | float) else default


def _texts(value: object) -> tuple[str, ...]:
    """Likewise, of several."""
    texts = value if isinstance(value, list) else ()
    return tuple(text for text in texts if isinstance(text, str))


def steps_trained_again(starts: Sequence[PastStart]) -> int:
    """Steps that were lost, and made once more by the next start or after the run had gone back."""
    return sum(max(0, before.reached - after.step) for before, after in pairwise(_all(starts)))


def effective_share(starts: Sequence[PastStart], now: float, step: int) -> float:
    """The share of the time since the first start that went into steps that count.

    Start-up with its first step does not count, nor do steps that were trained again and the time
    in which nothing ran. A save's stall does, and so does the loading where the run went back.

    Args:
        starts: at least one.
        now: Unix time.
        step: where the run stands, or from where it goes on.
    """
    elapsed, effective, kept_step = now - starts[0].begun, 0.0, step
    for stretch in reversed(_all(starts)):
        effective += _kept_s(stretch, kept_step)
        kept_step = min(kept_step, stretch.step)
    return min(1.0, effective / elapsed) if elapsed > 0 else 1.0


def _all(starts: Sequence[PastStart]) -> list[Stretch]:
    return [stretch for start in starts for stretch in start.stretches]


def _kept_s(stretch: Stretch, kept_step: int) -> float:
    """Seconds of those of its timed steps that nobody after it has made again."""
    num_steps = stretch.reached - stretch.timed_step
    if stretch.trains_since is None or num_steps <= 0:
        return 0.0
    num_kept = max(0, min(stretch.reached, kept_step) - stretch.timed_step)
    return max(0.0, stretch.ended - stretch.trains_since) * num_kept / num_steps


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

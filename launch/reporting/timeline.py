"""What befell a run, over the hours: lanes of marks, and a table."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from triptych.launch.reporting.run_record import RunRecord

STARTED = "started"
EXPECTED = ("first_step", "saved", "finished")
"""All else is drawn into the charts as well, but the first start."""
ROUTINE = (STARTED, *EXPECTED)
MOST_ROWS = 200
"""Newest events that a table lists."""
MOST_MARKS = 60
FIRST_TIME, LAST_TIME = 1.5e9, 1e11
"""Seconds since 1970 that a clock can show, and that no other number of an event is."""
NUM_PLACES = 200
"""Marks of a lane that are closer than this part of it are one."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Events of one kind."""

    what: str
    count: int
    places: list[float]
    """Percent of the time from the first event to the last."""
    is_routine: bool


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event in the table."""

    time: str
    step: int
    what: str
    details: str


@dataclass(frozen=True, slots=True)
class RunTimeline:
    """The events of one run."""

    name: str
    first: str
    last: str
    lanes: list[Lane]
    rows: list[EventRow]
    """Newest first."""
    num_left_out: int


def timeline(run: RunRecord) -> RunTimeline:
    """All events by kind, the newest as rows."""
    times = [_time(event) for event in run.events]
    known = [time for time in times if time is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    lanes: dict[str, set[int]] = defaultdict(set)
    counts: dict[str, int] = defaultdict(int)
    for event, time in zip(run.events, times, strict=True):
        what = event["what"]
        counts[what] += 1
        if time is not None:
            lanes[what].add(round(NUM_PLACES * (time - low) / ((high - low) or 1.0)))
    return RunTimeline(
        name=run.name,
        first=_clock(low) if known else "",
        last=_clock(high) if known else "",
        lanes=[
            Lane(
                _words(what),
                count,
                [100 * place / NUM_PLACES for place in sorted(lanes[what])],
                is_routine=what in ROUTINE,
            )
            for what, count in counts.items()
        ],
        rows=[_row(event) for event in reversed(run.events[-MOST_ROWS:])],
        num_left_out=max(0, len(run.events) - MOST_ROWS),
    )


def start_times(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """When the run was started."""
    times = (_time(event) for event in events if event["what"] == STARTED)
    return [time for time in times if time is not None]


def marks_of(run: RunRecord) -> list[tuple[float, str]]:
    """Step and text of what was not expected, and of every start but the first; the newest."""
    first = next((event for event in run.events if event["what"] == STARTED), None)
    shown = [event for event in run.events if event is not first and event["what"] not in EXPECTED]
    return [
        (float(event["step"]), f"{_words(event['what'])} at step {event['step']}")
        for event in shown[-MOST_MARKS:]
    ]


def _row(event: Mapping[str, Any]) -> EventRow:
    time = _time(event)
    details = [
        f"{_words(key)}: {_text(value)}"
        for key, value in event.items()
        if key not in ("time", "what", "step")
    ]
    return EventRow(
        _clock(time) if time is not None else "unknown",
        event["step"],
        _words(event["what"]),
        "; ".join(details),
    )


def _text(value: object) -> str:
    """Numbers without digits that nobody reads; those that are a time, as the clock shows it."""
    if isinstance(value, float):
        return _clock(value) if FIRST_TIME < value < LAST_TIME else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _time(event: Mapping[str, Any]) -> float | None:
    """Seconds since 1970; None of a time that no clock can show."""
    return float(event["time"]) if 0 < event["time"] < LAST_TIME else None


def _clock(time: float) -> str:
    return f"{datetime.fromtimestamp(time).astimezone():%Y-%m-%d %H:%M:%S}"

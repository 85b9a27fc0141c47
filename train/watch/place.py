"""Where the training thread of this process is, and what its steps usually take.

A process has one training thread, so this is kept once for it, as a log is: the loop and the hooks
say where they are without knowing who listens.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import median

from triptych.parallel.waits import waited_s

RECENT_STEPS = 20


class Phase(IntEnum):
    """Parts of a run, in the order in which a step goes through them."""

    START = 0
    DATA = 1
    COMPUTE = 2
    HOOKS = 3
    LEFT = 4


@dataclass(frozen=True, slots=True, eq=False)
class Whereabouts:
    """What the training thread is doing."""

    phase: Phase
    step: int
    """The step that is under way; 0 before the first of this start."""
    doing: str = ""
    """Closer: which part of the start, which hook, by which error it left."""

    def __str__(self) -> str:
        if self.phase is Phase.START:
            return f"starting ({self.doing})"
        words = {
            Phase.DATA: "waiting for data",
            Phase.COMPUTE: "computing",
            Phase.HOOKS: f"in {self.doing} after the step",
            Phase.LEFT: f"gone from the run {self.doing}".rstrip(),
        }
        return f"step {self.step}, {words[self.phase]}"


@dataclass(slots=True)
class _Here:
    """The state of this module."""

    place: Whereabouts = Whereabouts(Phase.LEFT, 0)
    since_s: float = 0.0
    waited_before_s: float = 0.0
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    spent_s: dict[str, float] = field(default_factory=dict)


_here = _Here()


def begin() -> None:
    """A run begins in this process."""
    _here.steps_s.clear()
    _here.spent_s = {}
    enter(Phase.START, doing="process groups")


def enter(phase: Phase, step: int | None = None, doing: str = "") -> None:
    """Say where the training thread is from now on; ``step`` as before where it is left out."""
    now, waited, before = time.perf_counter(), waited_s(), _here.place
    key = before.doing or before.phase.name
    own_s = now - _here.since_s - (waited - _here.waited_before_s)
    _here.spent_s[key] = _here.spent_s.get(key, 0.0) + own_s
    _here.since_s, _here.waited_before_s = now, waited
    _here.place = Whereabouts(phase, before.step if step is None else step, doing)


def here() -> Whereabouts:
    """Where the training thread is: a new object at each ``enter``."""
    return _here.place


def take_spent_s() -> dict[str, float]:
    """Seconds by phase, or by hook, since this was last asked, without waits for other ranks."""
    spent, _here.spent_s = _here.spent_s, {}
    return spent


def learn(step_s: float) -> None:
    """A step has taken so long."""
    _here.steps_s.append(step_s)


def usual_step_s() -> float | None:
    """The median of recent steps; None before the first, which loads and allocates, is done."""
    recent = list(_here.steps_s)[1:] if len(_here.steps_s) < RECENT_STEPS else _here.steps_s
    return median(recent) if recent else None

"""Whether a run hangs, and which rank the others wait for. Decided from what one rank sees of all.

Ranks stop at the collectives of every step, so the others are never further ahead of a late rank
than that. Who is furthest behind decides, by what its own phase may take: a rank that waits for a
late loader, or for a save, waits rightly for as long as the late one may take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from triptych.train.watch.place import Phase, Whereabouts

STEPS = 3
"""A step that takes so many usual ones, and the slack, is late."""
UNLEARNT = 3
"""Times the slack that a rank may be silent before it has done a step: libraries are loaded."""
WITHIN_TIMEOUT = 0.9
"""The watch speaks before the collectives time out, which cannot say whom they wait for."""


@dataclass(frozen=True, slots=True)
class Grant:
    """How long a rank may stay where it is, and how long be silent, in seconds."""

    slack_s: float
    timeout_s: float
    """Of collectives."""
    usual_step_s: float | None
    """None before it is learnt."""

    def stay_s(self, phase: Phase) -> float:
        """How long a rank may stay in one place.

        Computing has learnt its limit. What else the loop does, waiting for a storage that retries,
        saving, validating, may take as long as the others' collectives wait for it. A start has
        no limit: whole checkpoints are read without a sign.
        """
        if phase is Phase.START:
            return math.inf
        if phase is Phase.COMPUTE and self.usual_step_s is not None:
            return self._learnt_s(self.usual_step_s)
        return WITHIN_TIMEOUT * self.timeout_s

    @property
    def silence_s(self) -> float:
        """How long a process may show no sign of life: none of its threads runs, or none can."""
        if self.usual_step_s is None:
            return UNLEARNT * self.slack_s
        return self._learnt_s(self.usual_step_s)

    def _learnt_s(self, step_s: float) -> float:
        """Half of the slack is for telling all ranks, for writing stacks, and for leaving."""
        return STEPS * step_s + self.slack_s / 2


@dataclass(frozen=True, slots=True)
class Seen:
    """A rank as the one that judges sees it."""

    rank: int
    host: str
    process: int
    place: Whereabouts
    stayed_s: float
    """In this place, by its own count."""
    may_stay_s: float
    waits_for: str
    """The collective that it waits in, if it does."""
    silent_s: float
    """Since its last sign of life."""

    def __str__(self) -> str:
        who = f"rank {self.rank} (host {self.host}, process {self.process})"
        where = f"{self.place}" + (f", in {self.waits_for}" if self.waits_for else "")
        if self.silent_s:
            return f"{who} shows no sign of life for {self.silent_s:.0f} s; last seen: {where}"
        return f"{who} stays for {self.stayed_s:.0f} s in {where}"


def late_ranks(ranks: Sequence[Seen], silence_s: float) -> list[Seen]:
    """The ranks that the others wait for in vain; none where nothing hangs.

    Silent ones, however the others stand. Else those furthest behind, once each of them has stayed
    for longer than it may: of these, who waits for nobody, or else all, as they wait for each
    other; or ranks that have left by an error, where there are any.
    """
    there = [seen for seen in ranks if seen.place.phase is not Phase.LEFT]
    silent = [seen for seen in there if seen.silent_s > silence_s]
    if silent or not there:
        return silent
    last = min((seen.place.step, seen.place.phase) for seen in there)
    behind = [seen for seen in there if (seen.place.step, seen.place.phase) == last]
    if any(seen.stayed_s <= seen.may_stay_s for seen in behind):
        return []
    failed = [seen for seen in ranks if seen.place.phase is Phase.LEFT and seen.place.doing]
    return failed or [seen for seen in behind if not seen.waits_for] or behind


def describe(late: Sequence[Seen], num_ranks: int, usual_step_s: float | None) -> str:
    """For people: who is late, the others not."""
    pace = (
        "no step is done yet"
        if usual_step_s is None
        else f"a step usually takes {usual_step_s:.3g} s"
    )
    everyone = "all ranks wait for each other:\n  " if len(late) == num_ranks > 1 else ""
    listed = "\n  ".join(map(str, late))
    return f"{everyone}{listed}; {pace}"

"""Which rank or link is slow, and why: decided from what each rank measured, without its waits.

Everyone waits for the slowest, so the whole time of a step is the same on all ranks. What a rank
does by itself is compared with what its peers do; a link shows in the least that any member of a
group waited, which is what the messages themselves took.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, median_low

NOTABLE = 0.1
"""Of a step's time: what a rank must take longer than its peers."""
COMPUTE, DATA, CHECKPOINT, NETWORK = "compute", "data", "checkpoint", "network"


@dataclass(frozen=True, slots=True)
class Times:
    """What a rank measured: medians over some steps, and over its last saves, in seconds."""

    host: str
    pp_rank: int
    step_s: float
    own_s: Mapping[str, float]
    """By cause, without waits for other ranks."""
    waits_s: Mapping[str, float]
    """By axis, as "tp"."""
    groups: Mapping[str, tuple[int, ...]]
    """Axis -> the ranks of this rank's group, where it has several."""


@dataclass(frozen=True, slots=True)
class Straggler:
    """What slows a run."""

    cause: str
    ranks: tuple[int, ...]
    """One; of a slow link, those that it may be, as it has two ends."""
    axis: str = ""
    """Of the group whose messages are slow."""
    extra_s: float = field(default=0.0, compare=False)
    """Beyond the peers', each step, or each save."""


def stragglers(ranks: Sequence[Times]) -> list[Straggler]:
    """All that are slow, by rank; none where all are equally slow.

    Computing is compared within a pipeline stage, as stages have different layers; the rest over
    all ranks. Half of a rank's peers, at least, must be faster. Links are looked at where nobody's
    own work is slow: who waits for a slow rank may wait in any group.
    """
    notable_s = NOTABLE * median(times.step_s for times in ranks)
    found = []
    for cause in (COMPUTE, DATA, CHECKPOINT):
        stages = [times.pp_rank if cause == COMPUTE else 0 for times in ranks]
        seconds = [times.own_s.get(cause, 0.0) for times in ranks]
        by_stage: dict[int, list[float]] = {}
        for stage, taken_s in zip(stages, seconds, strict=True):
            by_stage.setdefault(stage, []).append(taken_s)
        usual_s = {stage: median_low(all_s) for stage, all_s in by_stage.items()}
        for rank, (stage, taken_s) in enumerate(zip(stages, seconds, strict=True)):
            if taken_s - usual_s[stage] > notable_s:
                extra_s = taken_s - usual_s[stage]
                found.append(Straggler(cause, (rank,), extra_s=extra_s))
    return found or _slow_links(ranks, notable_s)


def _slow_links(ranks: Sequence[Times], notable_s: float) -> list[Straggler]:
    """Groups whose messages take longer than those of other groups that exchange as much.

    These are groups of one axis and, as stages have different layers, within one pipeline stage; pp
    groups go through all of them. A rank in slow groups of several axes is where the link is.
    """
    alike: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for times in ranks:
        for axis, group in times.groups.items():
            alike.setdefault((axis, 0 if axis == "pp" else times.pp_rank), set()).add(group)
    slow: list[Straggler] = []
    for (axis, _), groups in sorted(alike.items()):
        least = {
            group: min(ranks[rank].waits_s.get(axis, 0.0) for rank in group) for group in groups
        }
        for group, least_s in sorted(least.items()):
            extra_s = least_s - median_low(least.values())
            if extra_s > notable_s:
                slow.append(Straggler(NETWORK, group, axis, extra_s))
    common = set.intersection(*(set(one.ranks) for one in slow)) if len(slow) > 1 else set()
    if len(common) == 1:
        axes = ", ".join(dict.fromkeys(one.axis for one in slow))
        return [Straggler(NETWORK, tuple(common), axes, max(one.extra_s for one in slow))]
    return slow


class Alarms:
    """Lets through what was slow twice in a row, once: a single slow window is no straggler."""

    def __init__(self) -> None:
        self._before: set[Straggler] = set()
        self._told: set[Straggler] = set()

    def new(self, found: Sequence[Straggler]) -> list[Straggler]:
        """Those of this window that are to be told; one that was fast in between is told anew."""
        lasting = [one for one in found if one in self._before]
        new = [one for one in lasting if one not in self._told]
        self._before = set(found)
        self._told = (self._told & self._before) | set(lasting)
        return new

"""What each pipeline stage does when: 1F1B and interleaved 1F1B, simulated from times per pass.

A stage runs its passes in megatron-core's order (warm-up, then one forward and one backward by
turns, cool-down), each as soon as the stage is free and its input has arrived:

    stage 0   F0 F1 F2 F3 .. .. .. B0 F4 B1 F5 B2 ...
    stage 3   .. .. .. F0 B0 F1 B1 F2 B2 F3 B3 ...

A send never holds up the sender, and messages share no link: what is left out is small where a
microbatch's computation takes longer than its message (benchmarks/bubble.py measures the rest).

Source: the order is that of megatron-core 0.16.1, pipeline_parallel/schedules.py, where
``microbatch_group_size_per_vp_stage`` = pp; tests/costs/test_bubble.py compares it with a real run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Pass(NamedTuple):
    """One forward or backward pass of a model chunk."""

    chunk: int
    microbatch: int
    is_backward: bool


class Event(NamedTuple):
    """A pass, where and when it ran."""

    stage: int
    chunk: int
    microbatch: int
    is_backward: bool
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step, from the first forward pass to the last backward pass of any stage."""

    makespan_s: float
    bubble: float
    """Share of all stages' time within the makespan in which they idle."""
    events: tuple[Event, ...]
    """The passes of all stages; those of a stage in the order in which it runs them."""


def simulate(
    forward_s: ArrayLike, backward_s: ArrayLike, *, num_microbatches: int, p2p_s: float = 0.0
) -> Timeline:
    """Run one step of interleaved 1F1B, or of plain 1F1B where a stage has one chunk.

    Args:
        forward_s: (vpp, pp) seconds of a microbatch in each chunk of each stage, or
            (vpp, pp, num_microbatches) where microbatches differ.
        backward_s: the same of the backward pass, recomputation included.
        num_microbatches: a multiple of pp where vpp > 1, as megatron-core demands.
        p2p_s: from the end of a pass to its output's arrival on the next stage.
    """
    forward, backward = (
        _seconds(forward_s, num_microbatches),
        _seconds(backward_s, num_microbatches),
    )
    vpp, pp, _ = forward.shape
    orders = [
        pp_stage_passes(stage, pp=pp, vpp=vpp, num_microbatches=num_microbatches)
        for stage in range(pp)
    ]
    events = _run(orders, forward.tolist(), backward.tolist(), p2p_s)
    makespan = max(event.end_s for event in events)
    busy = float(forward.sum() + backward.sum())
    return Timeline(makespan, 1.0 - busy / (pp * makespan) if makespan else 0.0, tuple(events))


def makespan_of_orders(
    forward_s: ArrayLike, backward_s: ArrayLike
) -> Callable[[Sequence[int]], float]:
    """A quick function from an order of the microbatches to the makespan that ``simulate`` finds.

    Which pass waits for which does not depend on seconds, so one simulation orders all passes such
    that each comes after those that it waits for.

    Args:
        forward_s: (vpp, pp, num_microbatches), as of ``simulate``.
        backward_s: the same of the backward pass.
    """
    seconds = np.array([forward_s, backward_s], dtype=np.float64)
    _, vpp, pp, num_microbatches = seconds.shape
    events = simulate(*seconds, num_microbatches=num_microbatches).events
    number: dict[tuple[int, Pass], int] = {}
    last_on = [-1] * pp
    passes = []
    for stage, chunk, microbatch, is_backward, _, _ in events:
        todo = Pass(chunk, microbatch, is_backward)
        source = _input_of(stage, todo, pp=pp, vpp=vpp)
        row = ((is_backward * vpp + chunk) * pp + stage) * num_microbatches
        waits_for = last_on[stage], -1 if source is None else number[source]
        passes.append((row, microbatch, *waits_for))
        last_on[stage] = number[stage, todo] = len(number)
    took: list[float] = seconds.ravel().tolist()

    def makespan(order: Sequence[int]) -> float:
        ends = [0.0] * (len(passes) + 1)  # the last is of no pass: -1
        for i, (row, microbatch, before, source) in enumerate(passes):
            ends[i] = max(ends[before], ends[source]) + took[row + order[microbatch]]
        return max(ends)

    return makespan


def ideal_bubble(*, pp: int, num_microbatches: int, vpp: int = 1) -> float:
    """The bubble where every chunk costs the same and messages take no time."""
    return (pp - 1) / (vpp * num_microbatches + pp - 1)


def pp_stage_passes(stage: int, *, pp: int, vpp: int, num_microbatches: int) -> list[Pass]:
    """All passes of a stage in its order: warm-up, one forward one backward, cool-down."""
    assert vpp == 1 or num_microbatches % pp == 0, f"{num_microbatches=} is no multiple of {pp=}"
    group = pp if vpp > 1 else num_microbatches
    places = [
        (chunk, microbatch)
        for first in range(0, num_microbatches, group)
        for chunk in range(vpp)
        for microbatch in range(first, first + group)
    ]
    forwards = [Pass(chunk, microbatch, False) for chunk, microbatch in places]
    backwards = [Pass(vpp - 1 - chunk, microbatch, True) for chunk, microbatch in places]
    later_stages = pp - stage - 1
    warmup = later_stages if vpp == 1 else 2 * later_stages + (vpp - 1) * group
    warmup = min(warmup, len(forwards))
    by_turns = [turn for pair in zip(forwards[warmup:], backwards, strict=False) for turn in pair]
    return forwards[:warmup] + by_turns + backwards[len(forwards) - warmup :]


def _seconds(given: ArrayLike, num_microbatches: int) -> NDArray[np.float64]:
    """(vpp, pp, num_microbatches)."""
    seconds = np.asarray(given, dtype=np.float64)
    if seconds.ndim == 2:
        seconds = np.repeat(seconds[:, :, None], num_microbatches, axis=2)
    assert seconds.ndim == 3, f"seconds of shape {seconds.shape}, not by chunk and stage"
    assert seconds.shape[2] == num_microbatches
    return seconds


_Times = list[list[list[float]]]
"""[chunk][stage][microbatch]."""


def _run(
    orders: Sequence[Sequence[Pass]], forward: _Times, backward: _Times, p2p_s: float
) -> list[Event]:
    """Let every stage go on for as long as its inputs are there, until all passes have run."""
    pp, vpp = len(orders), len(forward)
    finished: dict[tuple[int, Pass], float] = {}
    free_at, position = [0.0] * pp, [0] * pp
    events: list[Event] = []
    num_passes = sum(map(len, orders))
    while len(events) < num_passes:
        before = len(events)
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                todo = order[position[stage]]
                source = _input_of(stage, todo, pp=pp, vpp=vpp)
                if source is not None and source not in finished:
                    break
                arrived = 0.0
                if source is not None:
                    arrived = finished[source] + (p2p_s if source[0] != stage else 0.0)
                start = max(free_at[stage], arrived)
                times = backward if todo.is_backward else forward
                end = start + times[todo.chunk][stage][todo.microbatch]
                finished[stage, todo] = free_at[stage] = end
                events.append(Event(stage, *todo, start, end))
                position[stage] += 1
        assert len(events) > before, "the order of passes waits for itself"
    return events


def _input_of(stage: int, todo: Pass, *, pp: int, vpp: int) -> tuple[int, Pass] | None:
    """Stage and pass whose output a pass waits for; None for the first chunk's forward pass."""
    step = 1 if todo.is_backward else -1
    place = todo.chunk * pp + stage + step
    if place < 0:
        return None
    if place == vpp * pp:
        return stage, todo._replace(is_backward=False)
    return place % pp, todo._replace(chunk=place // pp)

"""Tells which rank or link slows a run, and why."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from socket import gethostname
from statistics import median, median_low

import torch.distributed as dist

from triptych.parallel.mesh import Mesh
from triptych.parallel.waits import Waited, take_waits
from triptych.train.events import record_event
from triptych.train.hooks.hook import Hook
from triptych.train.state import TrainState
from triptych.train.watch.place import Phase, take_spent_s
from triptych.train.watch.stragglers import (
    CHECKPOINT,
    COMPUTE,
    DATA,
    NETWORK,
    Alarms,
    Straggler,
    Times,
    stragglers,
)

WINDOW_STEPS = 20
"""Steps between comparisons."""
SAVES = ("Checkpointing", "WeightsOnly")
"""Hooks whose time is that of a save, where it is more than nothing."""
RECENT_SAVES = 3
_log = logging.getLogger(__name__)


class SlowRanks(Hook):
    """On every rank: all measure, and every ``WINDOW_STEPS`` steps rank 0 compares."""

    def __init__(self, run_dir: Path, mesh: Mesh, checkpoint_every: int) -> None:
        self._run_dir, self._mesh, self._checkpoint_every = run_dir, mesh, checkpoint_every
        self._groups = {
            axis: tuple(dist.get_process_group_ranks(group))
            for axis, group in mesh.axes.items()
            if group.size() > 1
        }
        self._spent: list[Mapping[str, float]] = []
        self._waited: list[Waited] = []
        self._saves_s: deque[float] = deque(maxlen=RECENT_SAVES)
        self._alarms = Alarms()

    def on_start(self, state: TrainState) -> None:
        """What the start took is no step's."""
        take_spent_s()
        take_waits()

    def before_step(self, state: TrainState) -> None:
        """All that belongs to the step before is done: take it down, and compare now and then."""
        spent, waited = take_spent_s(), take_waits()
        if Phase.COMPUTE.name not in spent:
            return  # the first step is to come
        self._spent.append(spent)
        self._waited.append(waited)
        if state.step % self._checkpoint_every == 0:
            self._saves_s.append(sum(spent.get(hook, 0.0) for hook in SAVES))
        if state.step % WINDOW_STEPS == 0:
            everyone: Sequence[Times] = self._mesh.world.all_gather(self._times())
            self._spent, self._waited = [], []
            if self._mesh.is_main:
                for straggler in self._alarms.new(stragglers(everyone)):
                    self._tell(straggler, everyone, state.step)

    def _times(self) -> Times:
        data = [spent.get(Phase.DATA.name, 0.0) for spent in self._spent]
        compute = [
            spent[Phase.COMPUTE.name] - waited.on_device_s
            for spent, waited in zip(self._spent, self._waited, strict=True)
        ]
        waits = [waited.by_group_s for waited in self._waited]
        steps = [
            sum(spent.values()) + sum(waited.by_group_s.values())
            for spent, waited in zip(self._spent, self._waited, strict=True)
        ]
        return Times(
            host=gethostname(),
            pp_rank=self._mesh.pp_rank,
            step_s=median(steps),
            own_s={
                COMPUTE: median(compute),
                DATA: median(data),
                CHECKPOINT: median_low(self._saves_s) if len(self._saves_s) > 1 else 0.0,
            },
            waits_s={axis: median(wait.get(axis, 0.0) for wait in waits) for axis in self._groups},
            groups=self._groups,
        )

    def _tell(self, straggler: Straggler, everyone: Sequence[Times], step: int) -> None:
        hosts = list(dict.fromkeys(everyone[rank].host for rank in straggler.ranks))
        extra_s, step_s = straggler.extra_s, median(times.step_s for times in everyone)
        record_event(
            self._run_dir,
            "straggler",
            step=step,
            cause=straggler.cause,
            ranks=straggler.ranks,
            hosts=hosts,
            axis=straggler.axis,
            extra_s=round(extra_s, 4),
            step_s=round(step_s, 4),
        )
        _log.warning(
            "slow: %s of rank %s (host %s)%s takes %.3g s longer than its peers', steps take "
            '%.3g s  -> docs/operations.md, "A GPU or a node is slow"',
            straggler.cause,
            " or ".join(map(str, straggler.ranks)),
            ", ".join(hosts),
            f" over {straggler.axis}" if straggler.cause == NETWORK else "",
            extra_s,
            step_s,
        )

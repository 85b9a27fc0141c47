"""From the plan to the steps of one data-parallel rank, read ahead of training.

    training thread   next(loader) takes a finished step; loader.cursor is the place after it
    planning thread   plan -> packs of the global batch -> this rank's microbatches -> collate
    worker threads    one sample each: text, media, patches

Without workers the training thread does all of this, when it asks for a step.

What is handed out depends on the plan and the cursor alone: not on the number of threads, nor on
how far they are ahead. A checkpoint saves ``loader.cursor``; what was read ahead is read again.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing

from triptych.costs.flops import NO_WORK, Workload
from triptych.data.batch import Step
from triptych.data.loading.reader import BatchFormat, Reader
from triptych.data.loading.same_thread import threads_or_none
from triptych.data.plan.balance import assign
from triptych.data.plan.order import Cursor, Plan
from triptych.data.types import Pack, Source


class Loader:
    """The whole steps that the plan has, an iterator. Whoever makes one must ``close`` it."""

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Source],
        cursor: Cursor,
        form: BatchFormat,
        *,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        cost: Callable[[Workload], float],
        num_workers: int,
        prefetch_steps: int,
        order: Callable[[Sequence[Workload]], Sequence[int]] | None = None,
    ) -> None:
        """Reads nothing before the first step is asked for.

        Args:
            plan: the order of packs; this loader must be the only user of the object.
            sources: numbered as in the plan.
            cursor: where to begin.
            form: of the batches, on this rank.
            dp_rank: which share of each global batch.
            dp_size: number of shares.
            global_batch_size: packs per step, a multiple of dp_size * micro_batch_size.
            micro_batch_size: packs per microbatch.
            cost: of a pack; shares cost about the same. Must be the same on all ranks.
            num_workers: threads that decode media; with 0 there is no thread at all, and nothing is
                read ahead.
            prefetch_steps: steps that are read while one is trained on.
            order: of a share's microbatches, from dear to cheap, in which they go; None leaves it.
        """
        self.cursor = cursor
        """The place after the last step that was handed out."""
        self._plan, self._cost, self._order = plan, cost, order
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._prefetch_steps = prefetch_steps if num_workers else 0
        self._reader = Reader(sources, form, num_workers=num_workers)
        self._planner = threads_or_none(min(1, num_workers), "plan-steps")
        self._planned = cursor
        self._upcoming = self._next_packs() if plan.ends else None
        self.is_over = self._has_ended()
        """No whole step comes after ``cursor``."""
        self._pending: deque[Future[tuple[Step, Cursor, bool]]] = deque()

    @property
    def num_decoded(self) -> int:
        """Media decoded so far, those read ahead included and those of a cache not."""
        return self._reader.num_decoded

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Step:
        """The next step; waits until it is read. An error in any thread is raised here.

        Raises:
            StopIteration: after the last whole step.
        """
        try:
            self._read_ahead(max(1, self._prefetch_steps))
            step, self.cursor, self.is_over = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._read_ahead(self._prefetch_steps)
        return step

    def close(self) -> None:
        """End all threads; steps read ahead are dropped."""
        self._reader.close()
        self._planner.shutdown(cancel_futures=True)

    def _read_ahead(self, num_steps: int) -> None:
        while len(self._pending) < num_steps:
            self._pending.append(self._planner.submit(self._next_step))

    def _next_step(self) -> tuple[Step, Cursor, bool]:
        """Runs on the planning thread, if there is one; nobody else moves ``_planned``."""
        packs, self._planned = self._upcoming or self._next_packs()
        if len(packs) < self._global_batch_size:
            raise StopIteration
        self._upcoming = self._next_packs() if self._plan.ends else None
        loads = [self._plan.workload(pack) for pack in packs]
        costs = [self._cost(load) for load in loads]
        assignment = assign(
            costs,
            dp_size=self._dp_size,
            micro_batch_size=self._micro_batch_size,
        )
        groups = assignment[self._dp_rank]
        if self._order is not None:
            order = self._order([sum((loads[i] for i in group), NO_WORK) for group in groups])
            groups = [groups[place] for place in order]
        step = self._reader.read([[packs[i] for i in group] for group in groups])
        of_ranks = [sum(costs[i] for group in rank for i in group) for rank in assignment]
        step.imbalance = max(of_ranks) * self._dp_size / sum(of_ranks)
        return step, self._planned, self._has_ended()

    def _next_packs(self) -> tuple[list[Pack], Cursor]:
        return self._plan.next_packs(self._planned, self._global_batch_size)

    def _has_ended(self) -> bool:
        """Whether what was looked up last is no whole step."""
        return self._upcoming is not None and len(self._upcoming[0]) < self._global_batch_size


def validation_step(
    plan: Plan,
    sources: Sequence[Source],
    form: BatchFormat,
    *,
    num_packs: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    num_workers: int,
    round_to: int = 1,
) -> Step:
    """This rank's share of the first packs of a plan, all at once.

    Ranks get equally many microbatches in any layout, and all together exactly these packs: where
    they do not come out even, the first pack fills the gaps, with no token of it in the loss.

    Args:
        plan: of the validation sources.
        sources: numbered as in the plan.
        form: of the batches, on this rank.
        num_packs: of all ranks together.
        dp_rank: which share.
        dp_size: number of shares.
        micro_batch_size: packs per microbatch.
        num_workers: threads that decode media; 0 for this one.
        round_to: the number of microbatches of each rank is a multiple of this.
    """
    packs = plan.first_packs(num_packs)
    fillers = [packs[0]] * (-num_packs % (dp_size * micro_batch_size * round_to))
    share = (packs + fillers)[dp_rank::dp_size]
    num_real = len(packs[dp_rank::dp_size])
    starts = range(0, len(share), micro_batch_size)
    with closing(Reader(sources, form, num_workers=num_workers)) as reader:
        step = reader.read([share[start : start + micro_batch_size] for start in starts])
    for start, batch in zip(starts, step.microbatches, strict=True):
        real = share[start : min(start + micro_batch_size, num_real)]
        num_segments = sum(len(pack.samples) for pack in real)
        batch.leave_out(batch.segments[num_segments], batch.segments[-1])
    return step

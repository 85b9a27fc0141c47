"""Ends a run in which a rank hangs, names that rank, and leaves the stacks of all.

A thread of each rank tells the others, through the store at which the ranks met, where its training
thread is; this needs none of the process groups that may be stuck. Rank 0 reads what all tell and
judges; while it does not, the next rank that notices does (docs/adr/0020-a-watch-beside-groups.md).
"""

import contextlib
import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from typing import Any, NoReturn

import torch.distributed as dist

from triptych.configs.schema import Config
from triptych.parallel.waits import waits_for
from triptych.train.watch.leaving import STDERR, Hang, leave
from triptych.train.watch.place import Phase, Whereabouts, begin, enter, here, usual_step_s
from triptych.train.watch.stacks import STACKS
from triptych.train.watch.verdict import Grant, Seen, describe, late_ranks

POLL_S = 0.5
TAKE_OVER_S = 2.0
"""The next rank judges where nobody has for so long."""
MOST_DEPUTIES = 8
"""They come one after the other; all ranks beyond at once."""

ANSWER = timedelta(seconds=60)
"""Of the store."""
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def watching(config: Config, store: Any, rank: int, world_size: int) -> Iterator[None]:
    """Watch over this rank for as long as this lasts. Every rank must call this.

    Nothing with ``cluster.hang_s=0``.
    """
    begin()
    watch = Watchdog(config, store, rank, world_size) if config.cluster.hang_s else None
    if watch is not None:
        watch.start()
    error = "by an error"
    try:
        yield
        error = ""
    finally:
        enter(Phase.LEFT, doing=error)
        if watch is not None:
            watch.close()


@dataclass(slots=True)
class _Sign:
    """The last that was heard of a rank."""

    told: bytes
    unchanged_s: float = 0.0


class Watchdog:
    """The thread of one rank."""

    def __init__(self, config: Config, store: Any, rank: int, world_size: int) -> None:
        """Over a connection of its own: another thread of this rank may be waiting in the store."""
        self._run_dir = Path(config.run.dir)
        self._slack_s, self._timeout_s = config.cluster.hang_s, config.cluster.timeout_s
        self._store: Any = dist.PrefixStore("watch", store.clone())  # type: ignore[attr-defined]  # not in its __all__
        self._store.set_timeout(ANSWER)
        self._rank, self._world_size = rank, world_size
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._polled = time.monotonic()
        self._num_signs = 0
        self._place, self._stayed_s = here(), 0.0
        self._judged, self._unjudged_s = b"", 0.0
        self._signs: dict[int, _Sign] = {}

    def start(self) -> None:
        """Begin to watch, and be known to the others: one who never gave a sign is not missed."""
        self._tell()
        self._thread.start()

    def close(self) -> None:
        """Tell the others that this rank has left."""
        self._ended.set()
        self._thread.join(ANSWER.total_seconds())

    def _watch(self) -> None:
        try:
            while not self._ended.wait(POLL_S):
                self._poll()
            self._place = here()
            self._tell()
        except RuntimeError as error:  # torch's own: the store has gone with the launcher
            _log.warning("hangs are not noticed any more: the ranks' store is gone: %s", error)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _poll(self) -> None:
        now = time.monotonic()
        # A process that was stopped, as with its whole job, has not spent that time waiting.
        passed_s, self._polled = min(now - self._polled, 2 * POLL_S), now
        grant = Grant(self._slack_s, self._timeout_s, usual_step_s())
        # If this thread cannot run, as where another never lets go of Python's lock.
        faulthandler.dump_traceback_later(2 * grant.silence_s, file=STDERR)
        place = here()  # looked at once: the training thread goes on meanwhile
        self._stayed_s = self._stayed_s + passed_s if place is self._place else 0.0
        self._place = place
        self._tell(grant)
        if hang := self._read("hang"):
            self._leave(hang)
        judged = self._read("judged")
        self._unjudged_s = 0.0 if judged != self._judged else self._unjudged_s + passed_s
        self._judged = judged
        patience_s = TAKE_OVER_S + POLL_S * min(self._rank, MOST_DEPUTIES)
        if self._rank == 0 or self._unjudged_s > patience_s:
            self._judge(grant, passed_s)

    def _tell(self, grant: Grant | None = None) -> None:
        """Where this rank is. The number makes each sign of life another."""
        self._num_signs += 1
        sign = {
            "number": self._num_signs,
            "host": gethostname(),
            "process": os.getpid(),
            "place": asdict(self._place),
            "stayed_s": self._stayed_s,
            "may_stay_s": grant.stay_s(self._place.phase) if grant else 0.0,
            "waits_for": waits_for(),
        }
        self._store.set(f"rank/{self._rank}", json.dumps(sign))

    def _leave(self, hang: bytes) -> NoReturn:
        leave(Hang(**json.loads(hang)), self._store, self._run_dir, self._rank)

    def _judge(self, grant: Grant, passed_s: float) -> None:
        self._store.set("judged", f"{self._rank} {self._num_signs}")
        ranks = self._everyone(passed_s)
        late = late_ranks(ranks, grant.silence_s)
        if not late:
            return
        folder = f"{time.strftime('%Y%m%d_%H%M%S')}_step_{self._place.step}"
        hang = Hang(
            judge=self._rank,
            step=max(0, self._place.step - 1),
            silent=[[seen.host, seen.process] for seen in late if seen.silent_s],
            late=[asdict(seen) for seen in late],
            num_there=sum(seen.place.phase is not Phase.LEFT for seen in ranks),
            stacks=str(self._run_dir / STACKS / folder),
            told=describe(late, len(ranks), grant.usual_step_s),
        )
        self._leave(self._store.compare_set("hang", "", json.dumps(asdict(hang))))

    def _everyone(self, passed_s: float) -> list[Seen]:
        """All ranks that have given a sign of life so far."""
        for rank in set(range(self._world_size)) - self._signs.keys():
            if self._store.check([f"rank/{rank}"]):
                self._signs[rank] = _Sign(b"")
        keys = [f"rank/{rank}" for rank in self._signs]
        if self._store.has_extended_api():
            signs = self._store.multi_get(keys)
        else:
            signs = [self._store.get(key) for key in keys]
        for sign, told in zip(self._signs.values(), signs, strict=True):
            sign.unchanged_s = sign.unchanged_s + passed_s if sign.told == told else 0.0
            sign.told = told
        return [_seen(rank, self._signs[rank]) for rank in sorted(self._signs)]

    def _read(self, key: str) -> bytes:
        """The value; empty where there is none, which ``get`` would wait for."""
        return self._store.get(key) if self._store.check([key]) else b""


def _seen(rank: int, sign: _Sign) -> Seen:
    told = json.loads(sign.told)
    place = told["place"]
    return Seen(
        rank=rank,
        host=told["host"],
        process=told["process"],
        place=Whereabouts(Phase(place["phase"]), place["step"], place["doing"]),
        stayed_s=told["stayed_s"],
        may_stay_s=told["may_stay_s"],
        waits_for=told["waits_for"],
        silent_s=sign.unchanged_s if sign.unchanged_s > 2 * POLL_S else 0.0,
    )

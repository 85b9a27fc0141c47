"""Saves the run every so many steps or minutes, and at its end, beside training."""

import time
from pathlib import Path

from triptych.checkpoints.background_save import BackgroundSave
from triptych.checkpoints.run_state import RunSnapshot
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.schema import Config
from triptych.models.sharding import TensorSharding
from triptych.parallel.replicas import reduce_replicas
from triptych.train.console import say
from triptych.train.engine import Engine
from triptych.train.events import record_event
from triptych.train.hooks.hook import Hook, StepEvent


class Checkpointing(Hook):
    """On every rank: each writes its share, rank 0 commits.

    A checkpoint is committed after a later step, whose loss was finite and no spike: it is proven.
    Only the one at the end of a run is not, as no step follows. A step that updated nothing is not
    worth a checkpoint, but at the end.
    """

    def __init__(self, config: Config, engine: Engine, store: CheckpointStore) -> None:
        self._config, self._engine = config, engine
        self._save = BackgroundSave(
            store, engine.mesh.world, config.run.keep, config.run.keep_every
        )
        self._snapshot = RunSnapshot(engine.tensors, config)
        self._replicas = {
            name: parameter
            for name, parameter in engine.parameters.items()
            if engine.sharding[name] is TensorSharding.REPLICATED
        }
        self._averaged = ""
        self._begun = self._stall_s = 0.0
        self._last_save = time.monotonic()

    def asks_to_save(self) -> bool:
        """Rank 0's clock decides for all; one that is set back or forward is not asked."""
        minutes = self._config.run.save_every_minutes
        is_time = time.monotonic() - self._last_save >= minutes * 60
        return self._engine.mesh.is_main and minutes > 0 and is_time

    def after_step(self, event: StepEvent) -> None:
        """Go on with the save in flight; begin one where it is time to."""
        step = event.state.step
        is_time = event.result.totals.num_asking_to_save > 0
        is_due = is_time or step % self._config.run.checkpoint_every == 0
        is_due = (is_due and event.result.veto is None) or event.is_last
        self._advance(wait=is_due, proven=event.result.is_sound)
        if not is_due:
            return
        self._begun, self._last_save = time.perf_counter(), time.monotonic()
        drift = reduce_replicas(self._replicas, self._engine.optimizer, self._engine.mesh)
        self._averaged = (
            f" (tp copies of weights had drifted: {drift}; averaged)" if drift.name else ""
        )
        self._snapshot.take({"stage": self._config.stage.name, "train": event.state.to_json()})
        info = {
            "stage": self._config.stage.name,
            "plan": event.state.segments[-1].plan,
            "layout": str(self._engine.mesh.dims),
        }
        self._save.begin(step, self._snapshot, info)
        self._stall_s = time.perf_counter() - self._begun
        if event.is_last:
            self._advance(wait=True, proven=False)

    def settle(self) -> None:
        """Wait for the save in flight if it is proven: the run goes back. Every rank must call it.

        So what it goes back to follows from its steps, not from how fast a disk is.
        """
        if self._save.is_proven:
            self._advance(wait=True, proven=True)

    def close(self) -> None:
        """Leave nothing running."""
        self._save.close()

    def _advance(self, *, wait: bool, proven: bool) -> None:
        step = self._save.step
        if step is None or not (final := self._save.poll(wait=wait, proven=proven)):
            return
        say(f"checkpoint: {final}{self._averaged}")
        if self._engine.mesh.is_main:
            record_event(
                Path(self._config.run.dir),
                "saved",
                step=step,
                checkpoint=final.name,
                stall_s=round(self._stall_s, 3),
                seconds=round(time.perf_counter() - self._begun, 3),
            )

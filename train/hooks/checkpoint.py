"""Saves the run every ``run.checkpoint_every`` steps, and at its end."""

from pathlib import Path

from triptych.checkpoints.run_state import save_state
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.schema import Config
from triptych.errors import CheckpointError
from triptych.models.sharding import TensorSharding
from triptych.parallel.replicas import reduce_replicas
from triptych.train.console import say
from triptych.train.engine import Engine
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState


class Checkpointing(Hook):
    """On every rank: each writes its share, rank 0 commits."""

    def __init__(self, config: Config, engine: Engine, store: CheckpointStore) -> None:
        self._config, self._engine, self._store = config, engine, store
        self._replicas = {
            name: parameter
            for name, parameter in engine.parameters.items()
            if engine.sharding[name] is TensorSharding.REPLICATED
        }

    def after_step(self, event: StepEvent) -> None:
        """Save where it is time to."""
        step = event.state.step
        if step % self._config.run.checkpoint_every and not event.is_last:
            return
        drift = reduce_replicas(self._replicas, self._engine.optimizer, self._engine.mesh)
        try:
            final = self._save(event.state)
        except CheckpointError as error:
            raise CheckpointError(
                f"step {step} could not be saved in {self._store.root}:\n{error}\n"
                "  -> what was saved before is as it was; mend the cause (run.keep=1 needs less "
                "room) and type the command again: the run resumes"
            ) from error
        self._store.retain(self._config.run.keep)
        averaged = f" (tp copies of weights had drifted: {drift}; averaged)" if drift.name else ""
        say(f"checkpoint: {final}{averaged}")

    def _save(self, state: TrainState) -> Path:
        """Write a checkpoint and commit it; returns its folder."""
        numbers = {"stage": self._config.stage.name, "train": state.to_json()}
        info = {
            "stage": self._config.stage.name,
            "plan": state.segments[-1].plan,
            "layout": str(self._engine.mesh.dims),
        }
        writer = self._store.begin(state.step)
        save_state(writer.folder, self._engine.tensors, numbers)
        writer.describe(self._config.model, self._config)
        return writer.commit(info)

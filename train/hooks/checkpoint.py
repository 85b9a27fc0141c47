"""Saves the run every ``run.checkpoint_every`` steps, and at its end."""

from triptych.checkpoints.model_file import write_model
from triptych.checkpoints.run_state import save_state
from triptych.checkpoints.store import CheckpointStore
from triptych.configs.compose import save_config
from triptych.configs.schema import Config
from triptych.train.engine import Engine
from triptych.train.hooks.hook import StepEvent
from triptych.train.report import say


class Checkpointing:
    """On every rank: each writes its share, rank 0 commits."""

    def __init__(self, config: Config, engine: Engine, store: CheckpointStore) -> None:
        self._config, self._engine, self._store = config, engine, store

    def after_step(self, event: StepEvent) -> None:
        """Save where it is time to."""
        step = event.state.step
        if step % self._config.run.checkpoint_every and not event.is_last:
            return
        numbers = {"stage": self._config.stage.name, "train": event.state.to_json()}
        info = {
            "stage": self._config.stage.name,
            "plan": event.state.segments[-1].plan,
            "layout": str(self._engine.mesh.dims),
        }
        folder = self._store.begin(step)
        save_state(folder, self._engine.tensors, numbers)
        if self._engine.mesh.is_main:
            save_config(self._config, folder / "config.yaml")
            write_model(folder, self._config.model)
        final = self._store.commit(folder, info)
        self._store.retain(self._config.run.keep)
        say(self._engine.mesh, f"checkpoint: {final}")

    def close(self) -> None:
        """Nothing is pending: saves are synchronous."""

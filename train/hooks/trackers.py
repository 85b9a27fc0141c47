"""``metrics.jsonl``, Weights & Biases and TensorBoard; on rank 0."""

import json
import secrets
from dataclasses import asdict
from pathlib import Path

from triptych.configs.rules.training import MAX_WANDB_NAME
from triptych.configs.schema import Config
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.json_lines import JsonLines
from triptych.train.records import METRICS, flatten
from triptych.train.state import TrainState


class MetricsFile(Hook):
    """Writes ``metrics.jsonl``."""

    def __init__(self, run_dir: Path) -> None:
        self._lines = JsonLines(run_dir / METRICS)

    def after_step(self, event: StepEvent) -> None:
        """Append the step's metrics."""
        self._lines.write(event.metrics)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class WandbTracker(Hook):
    """Sends each step's metrics to Weights & Biases; a resumed run goes on under its id.

    ``log.wandb_mode=offline`` keeps them in the run folder.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir = config, run_dir

    def on_start(self, state: TrainState) -> None:
        """Open the run there, or open it again."""
        import wandb

        config = self._config
        self._run = wandb.init(
            project=config.log.wandb_project,
            mode=config.log.wandb_mode,  # type: ignore[arg-type]  # validated
            name=config.log.wandb_name or config.run.dir[-MAX_WANDB_NAME:],
            group=config.log.wandb_group,
            tags=config.log.wandb_tags,
            dir=str(self._run_dir),
            id=_own_id(self._run_dir / "wandb" / "id"),
            config=json.loads(json.dumps(asdict(config), default=lambda value: value.name)),
            resume="allow",
        )

    def after_step(self, event: StepEvent) -> None:
        """Log the step's numbers under their names."""
        self._run.log(flatten(event.metrics), step=event.state.step)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class TensorBoardTracker(Hook):
    """Writes each step's metrics as TensorBoard scalars into ``run.dir/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = str(run_dir / "tensorboard")

    def on_start(self, state: TrainState) -> None:
        """Open the log; steps after this place, of a run that died, will not be shown."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=state.step + 1)

    def after_step(self, event: StepEvent) -> None:
        """Write the step's numbers under their names."""
        for name, value in flatten(event.metrics).items():
            self._writer.add_scalar(name, value, event.state.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _own_id(file: Path) -> str:
    """The run's id, drawn at its first start."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return file.read_text()

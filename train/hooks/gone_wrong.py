"""What follows when the numbers of a step go wrong: it is told, and the run goes on, back, or ends.

A loss or gradient that is not finite updates nothing. After three such steps in a row the run ends;
or it goes back, once, if it stands on a checkpoint that no later loss has proven. What a spike of
the loss does, ``train.spikes.action`` says: each of its ways back is bounded, too.
"""

import logging
from pathlib import Path

from triptych.checkpoints.layout import CHECKPOINTS, parse_step
from triptych.checkpoints.store import is_proven, proven_folders
from triptych.configs.schema import Config, SpikeAction
from triptych.errors import CheckpointError, TrainingError
from triptych.parallel.agree import on_rank_0
from triptych.parallel.mesh import Mesh
from triptych.train.events import record_event
from triptych.train.hooks.checkpoint import Checkpointing
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.start import StartingPoint
from triptych.train.state import TrainState
from triptych.train.stop import GoBackError
from triptych.train.veto import VetoCause

MOST_IN_A_ROW = 3
"""Updates that are skipped, and times that a run goes back to the same checkpoint."""
_log = logging.getLogger(__name__)


class GoneWrong(Hook):
    """On every rank, after what writes the step down, and before it is saved."""

    def __init__(
        self, config: Config, mesh: Mesh, start: StartingPoint, checkpointing: Checkpointing
    ) -> None:
        self._config, self._mesh, self._start = config, mesh, start
        self._run_dir = Path(config.run.dir)
        self._checkpointing = checkpointing

    def after_step(self, event: StepEvent) -> None:
        """Tell what went wrong, and decide what follows: on every rank alike.

        Raises:
            GoBackError: to an earlier checkpoint.
            TrainingError: that would not help, or no longer.
        """
        result, state = event.result, event.state
        if result.veto is None and not result.is_spike:
            return
        self._tell(event)
        if result.is_spike and self._config.train.spikes.action is SpikeAction.roll_back:
            self._roll_back(state)
        if result.veto is not None and state.skipped_in_a_row >= MOST_IN_A_ROW:
            if result.veto.cause is VetoCause.not_finite:
                self._distrust_the_start(state)
            raise TrainingError(self._three_in_a_row(event))

    def _roll_back(self, state: TrainState) -> None:
        """Pass over the data since the newest proven checkpoint; without one, nothing happens."""
        self._checkpointing.settle()
        target = self._newest_proven()
        if target is None:
            return
        step = parse_step(target.name).step
        if sum(packs.step == step for packs in state.passed_over) >= MOST_IN_A_ROW:
            raise TrainingError(
                f"step {state.step}: the loss is a spike, and the run has gone back to step {step} "
                f"{MOST_IN_A_ROW} times, each time past other data: the data alone are not the "
                f"cause  -> see {self._run_dir / 'events.jsonl'}; a lower learning rate, or "
                "resume=PATH of an older checkpoint"
            )
        raise GoBackError(state, passes_over=True)

    def _distrust_the_start(self, state: TrainState) -> None:
        """Where no loss was sound since a checkpoint that was never proven, its weights may be why.

        Only once: what the run goes back to is proven.
        """
        folder, started = self._start.checkpoint, self._start.state.step
        none_sound = state.step - state.skipped_in_a_row <= started
        if folder is None or not (self._start.resumes and none_sound):
            return
        may_be_ruined = on_rank_0(
            self._mesh.world, lambda: not is_proven(folder), os_error=CheckpointError
        )
        if may_be_ruined and self._newest_proven() is not None:
            raise GoBackError(state, passes_over=False)

    def _newest_proven(self) -> Path | None:
        root = self._run_dir / CHECKPOINTS
        return on_rank_0(
            self._mesh.world,
            lambda: next(iter(proven_folders(root)), None),
            os_error=CheckpointError,
        )

    def _tell(self, event: StepEvent) -> None:
        """On the terminal, and in the run's history with the packs and samples at fault."""
        if not self._mesh.is_main:
            return
        result, state = event.result, event.state
        packs = f"packs {', '.join(map(str, result.veto.packs))}" if result.veto else "its packs"
        why = str(result.veto) if result.veto else "the loss is a spike"
        done = "nothing was updated" if result.veto else "weights were updated all the same"
        loss = "" if result.loss is None else f" (loss {result.loss:.4g}, {self._limit(event)})"
        _log.warning("step %d: %s%s; %s, %s", state.step, why, loss, done, packs)
        details = {"loss": result.loss, "loss_limit": result.loss_limit} if result.is_spike else {}
        if result.veto is None:
            record_event(self._run_dir, "spike", step=state.step, **details)
            return
        record_event(
            self._run_dir,
            "update_skipped",
            step=state.step,
            cause=result.veto.cause.value,
            ranks=result.veto.ranks,
            packs=result.veto.packs,
            samples=result.veto.samples,
            **details,
        )

    def _limit(self, event: StepEvent) -> str:
        spikes = self._config.train.spikes
        return (
            f"{event.result.loss_limit:.4g} is {spikes.sigmas:g} standard deviations above the "
            f"mean of {spikes.window} steps"
        )

    def _three_in_a_row(self, event: StepEvent) -> str:
        veto = event.result.veto
        assert veto is not None
        step = event.state.step
        return (
            f"step {step}: {veto}, as in the {MOST_IN_A_ROW - 1} steps before, or theirs was "
            f"wrong otherwise; none of them updated anything\n  -> python launch/replay.py "
            f"{self._run_dir} step={step} --run tells a flipped bit from bad data (packs "
            f"{', '.join(map(str, veto.packs))}); or resume with a lower learning rate"
        )

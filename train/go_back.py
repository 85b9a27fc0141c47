"""How a run goes on from an earlier checkpoint of its own, without ending."""

from triptych.checkpoints.run_state import load_numbers
from triptych.checkpoints.store import CheckpointStore
from triptych.errors import TrainingError
from triptych.train.start import StartingPoint
from triptych.train.state import TrainState
from triptych.train.stop import GoBackError


def earlier_start(back: GoBackError, store: CheckpointStore) -> StartingPoint:
    """The newest proven checkpoint that is good, and what goes on there. Every rank must call this.

    Raises:
        CheckpointError: none of those that are there is good.
        TrainingError: there is none, or it is from before the data started anew by another plan.
    """
    folder = store.newest(proven=True)
    now = back.state
    if folder is None:
        raise TrainingError(f"{back}, but {store.root} has no proven checkpoint any more")
    state = TrainState.from_json(load_numbers(folder)["train"])
    if state.segments != now.segments:
        raise TrainingError(
            f"{back}, but {folder} is of another plan of the data  -> resume={folder} "
            "data.accept_new_plan=true goes on from there"
        )
    if back.passes_over:
        state = state.passing_over(now)
    return StartingPoint(state, folder, resumes=True)

"""Where the time of a run went, from the clock times of its steps and what each measured."""

import numpy as np
from numpy.typing import NDArray

from triptych.launch.reporting.run_record import RunRecord
from triptych.launch.reporting.step_table import Numbers
from triptych.launch.reporting.timeline import start_times

PARTS = {"compute_s": "compute and waiting for ranks", "data_s": "waiting for data"}
"""Metric -> what it is; they add up to ``step_time_s``."""
BETWEEN = "between steps (hooks)"


def parts_of_steps(run: RunRecord) -> dict[str, Numbers]:
    """Seconds of each step, by part; those of the step in which a start falls hold no standstill.

    Returns:
        Part -> (num_steps,).
    """
    steps = run.steps
    parts = {label: steps[name] for name, label in PARTS.items()}
    parts[BETWEEN] = np.where(_has_start(run), 0.0, _gaps(run))
    return parts


def time_shares(run: RunRecord) -> dict[str, float]:
    """Seconds from the first step to the last, by part, standstill between starts included."""
    spent = {label: float(np.nansum(seconds)) for label, seconds in parts_of_steps(run).items()}
    starts = _has_start(run)
    if starts.any():
        spent["stopped, starting or lost"] = float(np.nansum(_gaps(run)[starts]))
    return spent


def _gaps(run: RunRecord) -> Numbers:
    """Seconds before each step that belong to no step: (num_steps,), 0 where unknown."""
    ends = run.steps["time"]
    gaps = np.diff(ends, prepend=np.nan) - run.steps["step_time_s"]
    return np.maximum(np.nan_to_num(gaps), 0.0)


def _has_start(run: RunRecord) -> NDArray[np.bool_]:
    """Whether the run was started anew between the step before and each step."""
    ends, starts = run.steps["time"], np.array(start_times(run.events))
    if not len(starts):
        return np.zeros(len(ends), dtype=bool)
    before = np.searchsorted(np.sort(starts), ends)
    later: NDArray[np.bool_] = np.diff(before, prepend=before[:1]) > 0
    return later

"""When a loss is a spike: so many standard deviations above the mean of the steps before."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from triptych.configs.schema import SpikesConfig

LEAST_SPREAD = 0.01
"""Of the mean. Where losses hardly differ, as in a run that knows its data by heart, rounding is
no spike."""


def loss_limit(recent_losses: Sequence[float], spikes: SpikesConfig) -> float:
    """The loss from which on the next step is a spike; infinite before ``window`` are known.

    Sums are exact, so all ranks have the same limit.
    """
    if len(recent_losses) < spikes.window:
        return math.inf
    mean = fmean(recent_losses)
    spread = max(pstdev(recent_losses, mean), LEAST_SPREAD * abs(mean))
    return mean + spikes.sigmas * spread

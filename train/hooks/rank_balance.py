"""How evenly the packs of a step are spread over the data-parallel ranks, as planned."""

from collections.abc import Mapping

from triptych.train.hooks.hook import Hook, StepEvent


class RankBalance(Hook):
    """Adds ``imbalance`` to the step's metrics; on rank 0: every rank plans the shares of all."""

    def measure(self, event: StepEvent) -> Mapping[str, float]:
        """The dearest rank's cost over the mean."""
        return {"imbalance": event.step.imbalance}

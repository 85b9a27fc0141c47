"""A hook whose failure is told, and costs the run nothing but the hook."""

import logging
from collections.abc import Callable
from typing import ParamSpec

from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState

P = ParamSpec("P")
_log = logging.getLogger(__name__)


class Harmless(Hook):
    """Passes on what it is told; the first error is logged, and nothing is passed on after it.

    For pictures, profiles and trackers: a network that is down, or a picture that cannot be drawn,
    ends no run. Only for hooks that call no collective and neither measure nor ask to stop.
    """

    def __init__(self, hook: Hook) -> None:
        self._hook: Hook | None = hook

    @property
    def kind(self) -> str:
        """That of what it guards."""
        return type(self._hook or self).__name__

    def on_start(self, state: TrainState) -> None:
        """Pass it on."""
        if self._hook is not None:
            self._attempt(self._hook.on_start, state)

    def before_step(self, state: TrainState) -> None:
        """Pass it on."""
        if self._hook is not None:
            self._attempt(self._hook.before_step, state)

    def after_step(self, event: StepEvent) -> None:
        """Pass it on."""
        if self._hook is not None:
            self._attempt(self._hook.after_step, event)

    def close(self) -> None:
        """Pass it on."""
        if self._hook is not None:
            self._attempt(self._hook.close)

    def _attempt(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:
            _log.warning(
                "%s fails and is left out from here on; the run goes on: %s: %s",
                type(self._hook).__name__,
                type(error).__name__,
                error,
            )
            self._hook = None

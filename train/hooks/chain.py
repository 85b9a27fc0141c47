"""The hooks of a run, called as one."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState
from triptych.train.stop import GoBackError, StopReason
from triptych.train.watch.place import Phase, enter

_log = logging.getLogger(__name__)


class HookChain:
    """Calls each of ``hooks`` in order, and closes them in reverse."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = hooks

    @contextlib.contextmanager
    def running(self, state: TrainState) -> Iterator[None]:
        """Start the hooks, and close those that were started, however this ends.

        The error that ends it is what the caller sees: errors that follow from it, in ``on_error``
        or ``close``, are logged. A run that goes back only closes them. Where all went well, the
        first error of ``close`` is raised, when all are closed.
        """
        started: list[Hook] = []
        try:
            for hook in self._hooks:
                hook.on_start(state)
                started.append(hook)
            yield
        except GoBackError:
            _log_errors(_errors_of(hook.close for hook in reversed(started)))
            raise
        except BaseException as error:
            _log_errors(_errors_of(partial(hook.on_error, error) for hook in started))
            _log_errors(_errors_of(hook.close for hook in reversed(started)))
            raise
        errors = _errors_of(hook.close for hook in reversed(started))
        _log_errors(errors[1:])
        if errors:
            raise errors[0]

    def before_step(self, state: TrainState) -> None:
        """Tell every hook that the step after ``state`` begins."""
        for hook in self._entered():
            hook.before_step(state)

    def asks_to_save(self) -> bool:
        """Whether any hook of this rank asks for it; all ranks learn of it in the step."""
        return any([hook.asks_to_save() for hook in self._hooks])

    def after_step(self, event: StepEvent) -> StopReason | None:
        """Collect what the hooks measure, then tell all of them; returns the first reason to stop.

        Everyone sees all metrics, in whatever order the hooks are.
        """
        measured: dict[str, Any] = dict(event.metrics)
        for hook in self._entered():
            measured |= hook.measure(event)
        event = replace(event, metrics=measured)
        reasons = [hook.after_step(event) for hook in self._entered()]
        return next((reason for reason in reasons if reason is not None), None)

    def _entered(self) -> Iterator[Hook]:
        """Each hook, and for the watch that it is its turn."""
        for hook in self._hooks:
            enter(Phase.HOOKS, doing=hook.kind)
            yield hook


def _errors_of(calls: Iterable[Callable[[], None]]) -> list[Exception]:
    """Make every call; one that fails keeps no other from its own."""
    errors: list[Exception] = []
    for call in calls:
        try:
            call()
        except Exception as error:
            errors.append(error)
    return errors


def _log_errors(errors: Iterable[Exception]) -> None:
    for error in errors:
        _log.warning("as training ended: %s: %s", type(error).__name__, error)

"""Hooks are told in order and closed in reverse, whatever fails; what they are told is fixed."""

import dataclasses
import itertools
from unittest import mock

import pytest

from triptych.configs.schema import Config
from triptych.data.plan.order import Cursor
from triptych.errors import TrainingError
from triptych.tests.helpers.runs import Runs, losses, refusal
from triptych.train.hooks.chain import HookChain
from triptych.train.hooks.hook import Hook, StepEvent
from triptych.train.state import TrainState
from triptych.train.stop import StopReason

STATE = TrainState(
    step=3, consumed_tokens=0, consumed_samples=0, cursor=Cursor((0,), (0,)), segments=()
)
EVENT = StepEvent(STATE, result=None, step=None, is_last=False, metrics={"loss": 2.0})


class Recording(Hook):
    """Writes down its calls, and fails in those that are named."""

    def __init__(self, name: str, calls: list, fails_in: str = "", asks: StopReason | None = None):
        self.name, self.calls, self.fails_in, self.asks = name, calls, fails_in, asks

    def record(self, call, told):
        self.calls.append((call, self.name, told))
        if call in self.fails_in.split():
            raise OSError(f"{self.name} fails in {call}")

    def on_start(self, state):
        self.record("on_start", state.step)

    def before_step(self, state):
        self.record("before_step", state.step)

    def measure(self, event):
        self.record("measure", dict(event.metrics))
        return {self.name: len(self.calls)}

    def after_step(self, event):
        self.record("after_step", dict(event.metrics))
        return self.asks

    def on_error(self, error):
        self.record("on_error", str(error))

    def close(self):
        self.record("close", None)


def chain_of(fails_in: dict[str, str], calls: list) -> HookChain:
    return HookChain([Recording(name, calls, fails_in.get(name, "")) for name in "abc"])


def names(calls: list, *wanted: str) -> list[str]:
    return [f"{call} {name}" for call, name, _ in calls if call in wanted]


def test_a_hook_that_implements_nothing_does_nothing():
    chain = HookChain([Hook()])
    with chain.running(STATE):
        chain.before_step(STATE)
        assert chain.after_step(EVENT) is None
    with pytest.raises(ValueError, match="first"), chain.running(STATE):
        raise ValueError("first")


def test_in_order_and_closed_in_reverse():
    calls = []
    chain = chain_of({}, calls)
    with chain.running(STATE):
        chain.before_step(STATE)
        chain.after_step(EVENT)
    order = ("on_start", "before_step", "measure", "after_step")
    expected = [(call, name) for call in order for name in "abc"]
    assert [call[:2] for call in calls] == [*expected, *(("close", name) for name in "cba")]


def test_every_hook_is_told_what_all_have_measured():
    """Also a hook that comes before the one that measures; the event itself stays as it was."""
    calls = []
    chain_of({}, calls).after_step(EVENT)
    told = [metrics for call, _, metrics in calls if call == "after_step"]
    assert told == [{"loss": 2.0, "a": 1, "b": 2, "c": 3}] * 3
    assert EVENT.metrics == {"loss": 2.0}


def test_an_event_cannot_be_changed():
    given = {"loss": 2.0}
    event = dataclasses.replace(EVENT, metrics=given)
    with pytest.raises(TypeError, match="does not support item assignment"):
        event.metrics["loss"] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.is_last = True
    given["loss"] = 1.0
    assert event.metrics["loss"] == 2.0


@pytest.mark.parametrize("asking", [{}, {"b": "enough"}, {"b": "enough", "c": "too late"}])
def test_the_first_reason_to_stop_counts_and_all_hooks_are_told(asking):
    calls = []
    reasons = {name: StopReason(text) for name, text in asking.items()}
    hooks = [Recording(name, calls, asks=reasons.get(name)) for name in "abc"]
    assert HookChain(hooks).after_step(EVENT) == reasons.get("b")
    assert len(names(calls, "after_step")) == 3


@pytest.mark.parametrize(
    "fails_in", [{}, {"a": "on_error"}, {"b": "close"}, {name: "on_error close" for name in "abc"}]
)
def test_the_error_that_ends_training_is_what_is_raised(fails_in, caplog):
    """Every hook is told of it and closed, whatever they do then; what failed then is logged."""
    calls = []
    error = KeyboardInterrupt("first")
    with pytest.raises(KeyboardInterrupt) as caught, chain_of(fails_in, calls).running(STATE):
        raise error
    assert caught.value is error
    told = ["on_error a", "on_error b", "on_error c", "close c", "close b", "close a"]
    assert names(calls, "on_error", "close") == told
    assert {text for call, _, text in calls if call == "on_error"} == {"first"}
    for name, moments in fails_in.items():
        for moment in moments.split():
            assert f"OSError: {name} fails in {moment}" in caplog.text


def test_an_error_in_close_is_raised_once_all_are_closed(caplog):
    calls = []
    with (
        pytest.raises(OSError, match="c fails in close"),
        chain_of({"a": "close", "c": "close"}, calls).running(STATE),
    ):
        pass
    assert names(calls, "on_error", "close") == ["close c", "close b", "close a"]
    assert "a fails in close" in caplog.text


def test_only_what_has_started_is_closed():
    calls = []
    with pytest.raises(OSError, match="b fails"), chain_of({"b": "on_start"}, calls).running(STATE):
        raise AssertionError("the block is not entered")
    assert names(calls, "on_error", "close") == ["on_error a", "close a"]


@pytest.mark.distributed
def test_hooks_of_every_rank_are_told_of_the_error_that_ends_a_run(pool, digits, tmp_path):
    """What was written until then is complete."""
    runs = Runs(pool, digits, tmp_path)
    for told, error in runs.call(fail_in_step_3, "run", "dp2"):
        assert error == "TrainingError: it broke"
        assert told[0] == ("on_start", "mine", 0)
        assert [name for name, *_ in told].count("after_step") == 2
        assert told[-2:] == [("on_error", "mine", "it broke"), ("close", "mine", None)]
    assert len(losses(runs.dir("run"))) == 2


def fail_in_step_3(config: Config) -> tuple[list, str]:
    """What a hook was told, and the error of the command."""
    from triptych.train import loop

    told, train_step, numbers = [], loop.train_step, itertools.count(1)

    def broken(*arguments, **more):
        if next(numbers) == 3:
            raise TrainingError("it broke")
        return train_step(*arguments, **more)

    def with_mine(hooks):
        return HookChain([*hooks, Recording("mine", told)])

    with (
        mock.patch("triptych.train.loop.train_step", broken),
        mock.patch("triptych.train.run.HookChain", with_mine),
    ):
        error = refusal(config)
    return told, error

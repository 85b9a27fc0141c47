"""What the terminal says of a step: rates that the first step does not spoil, in 120 columns."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from triptych.configs.compose import load_config
from triptych.costs.flops import NO_WORK
from triptych.data.batch import MediaWork
from triptych.data.plan.order import Cursor
from triptych.parallel.mesh import Dims
from triptych.tests.helpers.clock import Clock
from triptych.train.console import console
from triptych.train.hooks import progress
from triptych.train.hooks.hook import StepEvent
from triptych.train.hooks.progress import Progress
from triptych.train.state import TrainState
from triptych.train.step import StepResult, Totals

TOKENS = 1000
START_UP = "18.9 s (imports 8.7, data 10.2)"
BUDGET = 10**5


def event(step: int, last: int, **metrics: float) -> StepEvent:
    state = TrainState(
        step=step,
        consumed_tokens=step * TOKENS,
        consumed_samples=step,
        cursor=Cursor((0,), (0,)),
        segments=(),
    )
    totals = Totals(replace(NO_WORK, num_tokens=TOKENS), 1, 0, 0, MediaWork(), 0)
    result = StepResult(2.34567, 1.73, {"vit": 0.0, "llm": 9.8e-4}, totals)
    told = {"data_s": 0.0, "flops": 4e12, "fill": 0.998, "device_memory_bytes": None}
    told |= {"host_memory_bytes": 3 * 2**30, **metrics}
    return StepEvent(state, result, None, is_last=step == last, metrics=told)


@pytest.fixture
def lines(monkeypatch, capsys):
    """What is told of steps that take so many seconds each, as the terminal shows it."""

    def of(*seconds: float, words: tuple[str, ...] = (), start: int = 0, **metrics: float):
        clock = Clock()
        monkeypatch.setattr(progress, "time", clock)
        config = load_config(["train.num_steps=null", f"stage.token_budget={BUDGET}", *words])
        mesh = SimpleNamespace(dims=Dims(tp=1, pp=1, dp=1))
        told = Progress(config, mesh, START_UP)
        last = start + len(seconds)
        with console(0):
            told.on_start(event(start, last).state)
            for step, step_s in enumerate(seconds, start + 1):
                clock.now += step_s
                seen = event(step, last, **metrics)
                seen = replace(seen, metrics={**seen.metrics, **told.measure(seen)})
                told.after_step(seen)
        return capsys.readouterr().out.splitlines()

    return of


def test_the_first_step_is_told_apart_and_spoils_no_rate(lines):
    """37 s of 56, as measured: the mean of all steps would say 30 minutes left."""
    start_up, first, second, *_ = [line[15:] for line in lines(37.0, *[1.0] * 19)]
    assert start_up.startswith(f"start-up took {START_UP}, the first step 37.0 s")
    assert first == "stage2 step 1 | loss 2.3457, norm 1.73 | 3.0 GiB | lr 9.8e-4 | fill 0.998"
    assert "| 1k tok/s, 1 s/step | left 1m 38s |" in second


def test_a_slow_step_among_recent_ones_changes_no_rate(lines):
    told = lines(37.0, *[2.0] * 8, 60.0, *[2.0] * 5)
    assert all("| 500 tok/s, 2 s/step |" in line for line in told[2:])


def test_a_run_that_resumes_tells_its_first_step_apart_too(lines):
    told = lines(37.0, 1.0, start=70)
    assert "first step 37.0 s" in told[0]
    assert "step 72 " in told[2]
    assert "| 1k tok/s, 1 s/step | left 0m 28s" in told[2]


def test_waiting_for_data_shows_where_it_matters(lines):
    assert "data" not in lines(1.0, 1.0, data_s=0.005)[-1]
    assert lines(1.0, 1.0, data_s=0.25)[-1].endswith(" | data 25%")


@pytest.mark.parametrize(
    ("step_s", "steps"), [(1.0, [1, 10, 20, 24]), (59.0, [1, 3, 5, 7]), (61.0, [1, 2, 3])]
)
def test_lines_are_seldom_and_never_a_minute_apart(lines, step_s, steps):
    """Every ten steps where they are short, else at the first step that ends after a minute."""
    told = lines(*[step_s] * steps[-1], words=("log.every=10",))[1:]
    assert [int(line.split(" step ")[1].split()[0]) for line in told] == steps


CASES = {
    "debug": ((1.0, 1.0), {}, ("train.num_steps=20",)),
    "long": ((1234.5, 12.3456), {"data_s": 6.0}, ("train.num_steps=200000",)),
    "validates": ((1.0, 12.3), {"validation_loss": 2.5, "data_s": 1.0}, ()),
    "peak": ((1.0, 12.3), {"device_memory_bytes": 78.1 * 2**30}, ("cluster.peak_tflops=0.72",)),
}


@pytest.mark.parametrize("case", CASES)
def test_lines_fit_120_columns_with_time_and_memory(lines, case):
    seconds, metrics, words = CASES[case]
    told = lines(*seconds, words=(*words, "log.every=1"), start=123_456, **metrics)
    print("\n".join(told))
    assert max(map(len, told)) <= 120
    assert f"{'78.1' if case == 'peak' else '3.0'} GiB | " in told[-1]
    assert (" | MFU 45%" in told[-1]) == (case == "peak")
    assert (", validation 2.5000, norm " in told[-1]) == (case == "validates")

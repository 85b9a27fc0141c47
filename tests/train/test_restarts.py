"""What starts of a run come to: steps trained again, effective time, starts that lead nowhere."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from triptych.configs.compose import load_config
from triptych.errors import CrashLoopError
from triptych.parallel.agree import SingleProcess
from triptych.train.crash_loop import refuse_crash_loop
from triptych.train.data import Mixture
from triptych.train.events import read_events, record_event
from triptych.train.failures import collect_failures, leave_failure, suspected_hosts
from triptych.train.json_lines import JsonLines
from triptych.train.records import METRICS
from triptych.train.restarts import (
    effective_share,
    read_starts,
    starts_without_progress,
    steps_trained_again,
)
from triptych.train.run_folder import tell_of_the_start_before
from triptych.train.start_up import StartUp
from triptych.train.state import PlanSpan, TrainState


def told(what: str, step: int, time: float, **details: Any) -> dict[str, Any]:
    return {"what": what, "step": step, "time": time, **details}


def start(step: int, at: float) -> list[dict[str, Any]]:
    """A process that begins at a time, trains 5 s later, and has its first step 5 s after that."""
    return [
        told("started", step, at + 5, begun=at, hosts=["a", "b"], world_size=4),
        told("first_step", step + 1, at + 10),
    ]


KILLED_TWICE = [
    *start(0, 100),  # steps of one second: 1 at 110, 41 at 150
    told("saved", 40, 149.5),
    told("died", 41, 160, last_seen=150),
    *start(40, 160),
    told("died", 61, 200, last_seen=190),  # 41 at 170, 61 at 190: 20 steps for nothing
    *start(40, 200),
    told("saved", 100, 270),
    told("stopped", 111, 280),
]


def test_steps_and_times_of_starts_that_died():
    starts = read_starts(KILLED_TWICE)
    assert [(s.step, s.reached, s.end) for s in starts] == [
        (0, 41, "died"),
        (40, 61, "died"),
        (40, 111, "stopped"),
    ]
    assert [s.ended - s.trains_since for s in starts] == [40, 20, 70]
    assert starts[0].hosts == ("a", "b")
    assert steps_trained_again(starts) == 1 + 21


def test_effective_time_is_that_of_steps_that_count():
    """Of 180 s: steps 2 to 40 by the first start, none by the second, 42 to 111 by the third."""
    starts = read_starts(KILLED_TWICE)
    assert effective_share(starts, now=280, step=111) == pytest.approx((39 + 70) / 180)
    assert effective_share(starts[:2], now=200, step=40) == pytest.approx(39 / 100)
    assert effective_share(starts[:1], now=100, step=0) == 1.0


def test_of_a_start_that_runs_or_broke_off_the_last_event_counts():
    [*_, running] = read_starts([*start(0, 0), told("saved", 30, 40)])
    assert (running.reached, running.ended, running.end) == (30, 40, None)
    assert effective_share([running], now=40, step=30) == pytest.approx(30 / 40)
    [broken] = read_starts([told("started", 7, 5)])
    assert (broken.step, broken.reached, broken.trains_since) == (7, 7, None)
    assert effective_share([broken], now=10, step=7) == 0.0
    assert read_starts([]) == []


def test_a_clock_that_goes_back_makes_no_share_beyond_all():
    starts = read_starts([*start(0, 100), told("died", 50, 90, last_seen=20)])
    assert 0.0 <= effective_share(starts, now=90, step=50) <= 1.0
    assert math.isfinite(effective_share(starts, now=100, step=50))


def went_back(step: int, to_step: int, time: float, *, passed_over: bool) -> dict[str, Any]:
    return told("went_back", step, time, to_step=to_step, passed_over=passed_over)


WENT_BACK = [
    *start(4, 100),  # steps of one second: 5 at 110, 17 at 122
    told("saved", 14, 120.5),
    told("spike", 17, 122),
    went_back(17, 14, 122, passed_over=True),  # 15 at 123
    told("spike", 18, 126),
    went_back(18, 14, 126, passed_over=True),
    told("died", 16, 140, last_seen=128),
]


def test_steps_from_which_a_run_went_back_count_as_trained_again():
    [start] = read_starts(WENT_BACK)
    assert (start.step, start.reached, start.end) == (4, 16, "died")
    assert steps_trained_again([start]) == 3 + 4
    assert start.batches_on == 13 + 4 + 2, "of data, those that were passed over too"


def test_time_from_which_a_run_went_back_is_not_effective():
    """Steps 6 to 14 of 28 s, and then 15 and 16; none of these where the next start is from 14."""
    starts = read_starts(WENT_BACK)
    assert effective_share(starts, now=128, step=16) == pytest.approx((9 + 2) / 28)
    assert effective_share(starts, now=128, step=14) == pytest.approx(9 / 28)
    assert effective_share(starts, now=128, step=9) == pytest.approx(4 / 28)


def test_steps_of_starts_before_are_lost_too_where_a_run_goes_back_behind_its_start():
    """From step 8, which no loss had proven: of 2 to 8 of the first start 2 to 4 are left."""
    events = [
        *start(0, 0),  # 1 at 10, 8 at 17
        told("stopped", 8, 17),
        *start(8, 20),  # 9 at 30
        went_back(11, 4, 32, passed_over=False),
        told("saved", 6, 34),
    ]
    starts = read_starts(events)
    assert starts[1].batches_on == -2
    assert steps_trained_again(starts) == 7
    assert effective_share(starts, now=34, step=6) == pytest.approx((3 + 2) / 34)


def crash(step: int, reached: int, **details: Any) -> list[dict[str, Any]]:
    return [*start(step, 0), told("died", reached, 20, last_seen=15, **details)]


ASKED = [*start(8, 0), told("stopped", 8, 30)]
INTERRUPTED = [*start(8, 0), told("interrupted", 9, 30)]


@pytest.mark.parametrize(
    ("events", "num_stuck"),
    [
        ([], 0),
        (crash(8, 9), 1),
        (crash(8, 9) * 3, 3),
        (crash(4, 9) * 3 + crash(8, 9), 1),  # a checkpoint of step 8 lasted
        (crash(12, 15) + crash(8, 9) * 2, 2),  # 12 was damaged
        (crash(8, 9) * 2 + ASKED + crash(8, 9), 1),
        (crash(8, 9) * 2 + INTERRUPTED + crash(8, 9), 1),
        (crash(8, 9) * 3 + [told("gave_up", 8, 40)], 0),
        (crash(8, 9) * 3 + [told("gave_up", 8, 40)] + crash(8, 9), 1),
        (start(8, 0) * 2, 2),  # not even the start after it was there to tell
        (crash(4, 9), 0),
    ],
)
def test_starts_without_progress_are_the_last_of_the_same_step(events, num_stuck):
    assert len(starts_without_progress(events, step=8)) == num_stuck


FAILURES = {
    "by itself": [{"rank": 2, "host": "b", "is_cause": True}],
    "by itself, then its peer": [
        {"rank": 2, "host": "b", "is_cause": True},
        {"rank": 0, "host": "a", "is_cause": False},
    ],
    "killed, and its peers tell": [
        {"rank": rank, "host": "a", "is_cause": False} for rank in (0, 1, 2)
    ],
}


@pytest.mark.parametrize("failures", FAILURES.values(), ids=FAILURES)
def test_the_host_of_the_rank_that_failed_is_suspected(failures):
    assert suspected_hosts(failures, ["a", "b"], world_size=4) == ["b"]


def test_where_nobody_tells_nobody_is_suspected():
    assert suspected_hosts([], ["a", "b"], world_size=4) == []


def test_what_ranks_leave_is_found_once_and_in_order(tmp_path):
    leave_failure(tmp_path, 3, ValueError("of this rank\nand more"))
    leave_failure(tmp_path, 1, RuntimeError("[gloo] connection closed by peer"))
    (tmp_path / "failures" / "rank_00000.json").write_text('{"ra')
    first, second = collect_failures(tmp_path)
    assert (first["rank"], first["error"], first["is_cause"]) == (
        3,
        "ValueError: of this rank",
        True,
    )
    assert (second["rank"], second["is_cause"]) == (1, False)
    assert collect_failures(tmp_path) == []
    leave_failure(tmp_path / "missing", 0, ValueError("nowhere to leave it"))


LEFT = {"rank": 1, "host": "b", "time": 9.5, "error": "OSError: of it", "is_cause": True}
NOT_LEFT_SO = [
    [LEFT],
    "rank 1",
    7,
    None,
    *({name: value for name, value in LEFT.items() if name != key} for key in LEFT),
    *({**LEFT, key: value} for key in LEFT for value in (None, [LEFT[key]], {"rank": 1})),
]


def test_what_no_rank_has_left_so_keeps_no_run_from_starting(tmp_path):
    """Nor does it hide what others have left."""
    record_event(tmp_path, "started", step=4, hosts=["a", "b"], world_size=2)
    (tmp_path / "failures").mkdir()
    for number, content in enumerate([*map(json.dumps, NOT_LEFT_SO), "[" * 100_000]):
        (tmp_path / "failures" / f"rank_{number:05d}.json").write_text(content)
    (tmp_path / "failures" / "rank_99999.json").write_text(json.dumps(LEFT))
    tell_of_the_start_before(tmp_path, ALONE)
    died = read_events(tmp_path)[-1]
    assert (died["what"], died["failures"], died["suspects"]) == ("died", [LEFT], ["b"])


ALONE = SimpleNamespace(world=SingleProcess(), is_main=True)


@pytest.fixture(scope="module")
def small(digits):
    """A run that stands at its beginning: configuration, data, state."""
    words = ["train.seq_len=512", "train.global_batch_size=2", "data.window=64"]
    config = load_config([*words, f"data.root={digits}"])
    data = Mixture.open(config, config.data.mixtures[config.stage.name])
    plan = data.plan
    state = TrainState(0, 0, 0, cursor=plan.start, segments=(PlanSpan(step=0, plan=plan.hash),))
    return config, data, state


def crash_at(run_dir, *steps: int, **details: Any) -> None:
    for step in steps:
        record_event(run_dir, "started", step=0, hosts=["a", "b"], world_size=4)
        record_event(run_dir, "died", step=step, **details)


@pytest.mark.parametrize(
    ("steps", "details", "suspects"),
    [
        ((3, 3, 3), {}, ["the batch of step 4: packs 6 to 7, samples "]),
        ((3, 1, 2), {"suspects": ["b"]}, ["host b, where each"]),
        ((0, 0, 0), {"suspects": ["b"]}, ["host b", "the batch of step 1: packs 0 to 1"]),
        ((3, 1, 2), {}, ["failed in different steps and not on one host"]),
    ],
)
def test_a_run_that_gets_nowhere_gives_up_until_a_person_lets_it_go_on(
    steps, details, suspects, small, tmp_path
):
    config, data, state = small
    config = replace(config, run=replace(config.run, dir=str(tmp_path)))
    crash_at(tmp_path, *steps[:2], **details)
    refuse_crash_loop(config, ALONE, data, state)
    crash_at(tmp_path, steps[2], **details)
    for _ in range(2):  # however often a launcher tries
        with pytest.raises(CrashLoopError) as refused:
            refuse_crash_loop(config, ALONE, data, state)
        for text in (*suspects, f"finished: {', '.join(map(str, steps))}", f"then rm {tmp_path}/"):
            assert text in str(refused.value)
    assert [event["what"] for event in read_events(tmp_path)].count("gave_up") == 1
    (tmp_path / "crash_loop").unlink()
    refuse_crash_loop(config, ALONE, data, state)


@pytest.mark.parametrize(
    ("passed_over", "suspect"),
    [
        (True, "the batch of step 2: packs 8 to 9, samples "),
        (False, "the batch of step 2: packs 2 to 3, samples "),
    ],
)
def test_the_batch_that_is_suspected_lies_behind_data_that_were_passed_over(
    passed_over, suspect, small, tmp_path
):
    """Each start went back after 3 steps, and made one more."""
    config, data, state = small
    config = replace(config, run=replace(config.run, dir=str(tmp_path)))
    for _ in range(3):
        record_event(tmp_path, "started", step=0)
        record_event(tmp_path, "went_back", step=3, to_step=0, passed_over=passed_over)
        record_event(tmp_path, "died", step=1)
    with pytest.raises(CrashLoopError, match=suspect):
        refuse_crash_loop(config, ALONE, data, state)


def test_no_batch_is_suspected_where_the_data_lie_before_the_start(small, tmp_path):
    config, data, state = small
    config = replace(config, run=replace(config.run, dir=str(tmp_path)))
    state = replace(state, step=4)
    for _ in range(3):
        record_event(tmp_path, "started", step=4)
        record_event(tmp_path, "went_back", step=7, to_step=2, passed_over=False)
        record_event(tmp_path, "died", step=3)
    with pytest.raises(CrashLoopError, match="finished: 3, 3, 3") as refused:
        refuse_crash_loop(config, ALONE, data, state)
    assert "the batch of step" not in str(refused.value)


def test_who_names_a_checkpoint_is_not_refused(small, tmp_path):
    config, data, state = small
    config = replace(config, run=replace(config.run, dir=str(tmp_path)), resume="runs/mine")
    crash_at(tmp_path, 3, 3, 3)
    refuse_crash_loop(config, ALONE, data, state)


def test_the_next_start_tells_what_the_one_before_could_not(tmp_path):
    record_event(tmp_path, "started", step=4, hosts=["a", "b"], world_size=2)
    lines = JsonLines(tmp_path / METRICS)
    for step in (5, 6):
        lines.write({"step": step, "time": f"2026-11-25T14:03:0{step}.000+00:00"})
    lines.close()
    leave_failure(tmp_path, 0, RuntimeError("[gloo] connection closed by peer"))
    for _ in range(2):
        tell_of_the_start_before(tmp_path, ALONE)
    _, died = read_events(tmp_path)
    assert (died["what"], died["step"], died["suspects"]) == ("died", 6, ["b"])
    assert died["last_seen"] == 1795615386.0
    assert "closed by peer" in died["failures"][0]["error"]


def test_a_start_that_went_back_died_where_it_stood_then(tmp_path):
    """Not where it was when it went back, of which its metrics know nothing any more."""
    record_event(tmp_path, "started", step=4)
    record_event(tmp_path, "went_back", step=9, to_step=4, passed_over=True)
    lines = JsonLines(tmp_path / METRICS)
    for step in (5, 6):
        lines.write({"step": step})
    lines.close()
    tell_of_the_start_before(tmp_path, ALONE)
    died = read_events(tmp_path)[-1]
    assert (died["what"], died["step"]) == ("died", 6)


def test_start_up_is_told_by_part(monkeypatch):
    start_up = StartUp()
    for part, now in {"imports": 8.0, "data": 8.5, "weights": 8.4}.items():
        clock = SimpleNamespace(time=lambda now=now: start_up.begun + now)
        monkeypatch.setattr("triptych.train.start_up.time", clock)
        start_up.done(part)
    assert start_up.parts_s == {"imports": 8.0, "data": 0.5, "weights": 0.0}
    assert str(start_up) == "8.5 s (imports 8.0, data 0.5, weights 0.0)"

"""The history of a run: what is told is read back, whatever else stands in the file."""

import resource
from types import SimpleNamespace

import pytest

from triptych.train.events import EVENTS, read_events, record_event
from triptych.train.failures import leave_failure
from triptych.train.restarts import effective_share, read_starts, starts_without_progress
from triptych.train.run_folder import tell_of_the_start_before


def test_events_are_read_in_the_order_in_which_they_were_told(tmp_path):
    assert read_events(tmp_path) == []
    record_event(tmp_path, "started", step=0, hosts=["a", "b"])
    record_event(tmp_path, "stopped", step=7, reason="SIGTERM")
    started, stopped = read_events(tmp_path)
    assert (started["what"], started["step"], started["hosts"]) == ("started", 0, ["a", "b"])
    assert (stopped["what"], stopped["step"], stopped["reason"]) == ("stopped", 7, "SIGTERM")
    assert started["time"] <= stopped["time"]


def test_a_damaged_line_hides_no_other(tmp_path):
    record_event(tmp_path, "started", step=0)
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"what": "sto\xff\n')
    record_event(tmp_path, "started", step=3)
    assert [event["step"] for event in read_events(tmp_path)] == [0, 3]


def test_what_a_full_disk_has_cut_is_told_and_takes_nothing_after_it_along(tmp_path, caplog):
    record_event(tmp_path, "started", step=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / EVENTS).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, before[1]))
    try:
        record_event(tmp_path, "saved", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / EVENTS).stat().st_size == size + 9
    assert "does not take what happened (saved)" in caplog.text
    record_event(tmp_path, "stopped", step=3)
    assert [event["what"] for event in read_events(tmp_path)] == ["started", "stopped"]


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, caplog):
    record_event(tmp_path / "missing", "started", step=0)
    assert EVENTS in caplog.text
    assert "started" in caplog.text


def test_no_flipped_bit_keeps_a_run_from_starting(tmp_path):
    """The history is read at each start, for how often the run was started before."""
    record_event(tmp_path, "started", step=0, begun=1.5, hosts=["a", "b"], world_size=2)
    record_event(tmp_path, "died", step=7, last_seen=9.5, suspects=["b"])
    whole = bytearray((tmp_path / EVENTS).read_bytes())
    for bit in range(8 * len(whole)):
        flipped = whole.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / EVENTS).write_bytes(flipped)
        events = read_events(tmp_path)
        assert len(starts_without_progress(events, 0)) <= 1
        if starts := read_starts(events):
            effective_share(starts, 10.0, 7)


DAMAGED = (None, 5, "text", [[5]], {"a": 1})


@pytest.mark.parametrize("value", DAMAGED, ids=str)
@pytest.mark.parametrize("key", ["begun", "hosts", "world_size", "last_seen", "suspects"])
def test_a_value_of_another_kind_keeps_no_run_from_starting(key, value, tmp_path):
    details = {"begun": 1.5, "hosts": ["a"], "world_size": 2, key: value}
    record_event(tmp_path, "started", step=0, **details)
    leave_failure(tmp_path, 0, RuntimeError("[gloo] connection closed by peer"))
    tell_of_the_start_before(tmp_path, SimpleNamespace(is_main=True))
    record_event(tmp_path, "died", **{"step": 7, "last_seen": 9.5, "suspects": ["b"], key: value})
    starts = starts_without_progress(read_events(tmp_path), 0)
    assert len(starts) == 1
    assert 0.0 <= effective_share(starts, 10.0, 7) <= 1.0

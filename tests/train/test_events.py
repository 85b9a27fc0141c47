"""The history of a run: what is told is read back, whatever else stands in the file."""

from triptych.train.events import EVENTS, read_events, record_event


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


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, caplog):
    record_event(tmp_path / "missing", "started", step=0)
    assert EVENTS in caplog.text
    assert "started" in caplog.text

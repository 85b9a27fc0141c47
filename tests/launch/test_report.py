"""``launch/report.py``: one page that says what a run folder holds, whatever is in it."""

import json
import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from triptych.errors import ConfigError
from triptych.launch.report import main
from triptych.launch.reporting.axis import Axis, compact
from triptych.launch.reporting.chart import NUM_COLUMNS, Series, line_chart, running_means
from triptych.launch.reporting.facts import facts
from triptych.launch.reporting.run_record import read_run
from triptych.launch.reporting.time_spent import BETWEEN, time_shares
from triptych.launch.reporting.timeline import MOST_MARKS, marks_of
from triptych.tests.helpers.left_by_a_run import leave_run

EVIL = "<script>alert(1)</script>"


def page_of(tmp_path: Path, *words: str | Path) -> str:
    output = tmp_path / "page.html"
    main([*map(str, words), "--output", str(output)])
    return output.read_text()


class _Tags(HTMLParser):
    """The tags of a page, whether they are closed, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.names, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in ("meta", "img", "path"):
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "src") or value.startswith(("#", "data:image/webp;base64,"))

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.texts))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return leave_run(tmp_path_factory.mktemp("report") / "stage2", num_steps=300)


def test_a_page_says_all_that_a_run_left(whole, tmp_path, capsys):
    page = page_of(tmp_path, whole)
    tags = _Tags(page)
    assert tags.open == []
    assert not {"script", "link", "iframe"} & set(tags.names)
    told = tags.text
    for expected in (
        "300 of 1,000",
        "Loss per supervised token, stage2",
        "training (",
        "validation loss (",
        "Validation loss, stage2",
        "Share of right answers, stage2",
        "strings (",
        "Learning rate, stage2",
        "vit (",
        "adapter, llm (",  # which are the same in every step
        "MFU, %, stage2",
        "Where a step's time goes, s, stage2",
        "Fill: share of the packs",
        "Imbalance: planned cost",
        "Left 17m 30s",
        "More numbers",
        "anything (",
        "2; 20 steps trained again, effective training time ",
        "update skipped (1)",
        "ranks: 2, 5; cause: data",
        "step_000000200.1",
        "step_000000100.0.damaged",
        "strings missing 2 7 to 9 No such file",
        "tp=1 pp=1 dp=2, cpu, node7",
    ):
        assert expected in told, expected
    assert page.count("data:image/webp;base64,UklGR") == 1
    assert 'width="600"' in page  # the newest sheet of answers
    assert len(page) < 200_000
    assert capsys.readouterr().out.endswith("1 runs, 300 steps, " + f"{len(page) / 1e3:,.0f} kB\n")


def test_what_is_missing_is_said(tmp_path):
    empty = tmp_path / "run"
    empty.mkdir()
    told = _Tags(page_of(tmp_path, empty)).text
    for expected in (
        "none yet: there is no metrics.jsonl, or nothing in it",
        "Nothing to draw: no step has been recorded.",
        "No event is recorded",
        "No checkpoint yet.",
        "every sample that was asked for could be read",
        "No contact sheet lies in the run folder.",
        "There is no config.yaml that can be read.",
    ):
        assert expected in told, expected
    (empty / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    told = _Tags(page_of(tmp_path, empty)).text
    assert "No validation loss: train.validate_every=N measures it" in told
    assert "No MFU: cluster.peak_tflops" in told
    assert "training (2.5)" in told


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "lo',  # being written
        b"\xff\xfe\n",
        b"[1]\n",
        b"\n",
        b'{"step": "2"}\n',
        b'{"step": -3, "loss": 1.0}\n',
        b'{"step": 1%s, "loss": 1.0}\n' % (b"0" * 400),
        b'{"step": 2, "loss": 1%s}\n' % (b"0" * 400),
        b'{"step": 2, "loss": NaN, "grad_norm": Infinity, "lr": {"vit": -Infinity}}\n',
        b'{"step": 2, "loss": -1.0, "lr": 7, "time": "yesterday", "stage": {"a": 1}}\n',
        b'{"step": 2, "loss": [1, 2], "lr": {"vit": {"deeper": 1}}, "step_time_s": "long"}\n',
        b'{"step": 2, "num_tokens": 0, "step_time_s": 0.0, "loss": 0.0}\n',
    ],
)
def test_a_damaged_line_hides_no_other(line, tmp_path):
    for name in ("metrics.jsonl", "events.jsonl", "quarantine/dp_00000.jsonl"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"step": 1, "loss": 2.5, "what": "seen", "time": 1.7e9}\n' + line)
    told = _Tags(page_of(tmp_path, tmp_path / "run")).text
    assert "training (" in told
    assert "1 events, the newest first" in told
    is_record = line.startswith(b'{"step": 2')
    passed_over = line.endswith(b"\n") and not (is_record and b"0" * 400 not in line)
    assert ("metrics.jsonl: 1 damaged lines are passed over" in told) == passed_over


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "contact_sheet.png"])
@pytest.mark.parametrize("harm", [b"", b"\x00\xff", b"[1]", b'{"a": ', b"a: ${oc.env:HOME}\n"])
def test_a_damaged_file_hides_no_other(name, harm, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (run / name).write_bytes(harm)
    assert "training (2.5)" in _Tags(page_of(tmp_path, run)).text
    (run / name).unlink()
    (run / name).mkdir()
    assert "training (2.5)" in _Tags(page_of(tmp_path, run)).text


@pytest.mark.parametrize(
    "harm",
    [
        {"what": EVIL},
        {"what": "started", "begun": "now"},
        {"what": "died", "time": float("nan"), "last_seen": "now", "suspects": 7},
        {"what": "started", "time": 1e300, "hosts": 7},
        {"what": "started", "time": -5, "begun": []},
        {"time": 1.7e9, "details": {"ranks": [1, {"a": EVIL}]}},
    ],
)
def test_events_of_any_form_are_shown(harm, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (run / "events.jsonl").write_text(
        json.dumps({"time": 1.7e9, "what": "seen", "step": 1} | harm) + "\n"
    )
    tags = _Tags(page_of(tmp_path, run))
    assert "1 events, the newest first" in tags.text
    assert "script" not in tags.names


def test_no_name_is_taken_for_html(tmp_path):
    """In a folder's name, a stage, a metric, a group, a source, a reason, a key."""
    run = tmp_path / EVIL.replace("/", "\N{DIVISION SLASH}") / "a\udcffb"
    (run / "quarantine").mkdir(parents=True)
    line = {"step": 1, "loss": 1.0, "stage": EVIL, EVIL: 1.0, "lr": {EVIL: 1.0}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    bad = {"step": 1, "name": EVIL, "cause": EVIL, "reason": EVIL}
    (run / "quarantine" / "dp_00000.jsonl").write_text(json.dumps(bad) + "\n")
    (run / "config.yaml").write_text(f"'{EVIL}': '{EVIL}'\n")
    tags = _Tags(page_of(tmp_path, run))
    assert "script" not in tags.names
    assert tags.text.count("alert(1)") >= 8


def test_runs_of_one_stage_are_compared(tmp_path):
    """In the same charts; over tokens where their steps hold more or fewer of them."""
    runs = [leave_run(tmp_path / name, num_steps=50, lr=lr) for name, lr in RUNS.items()]
    told = _Tags(page_of(tmp_path, *runs)).text
    assert "slow (" in told
    assert "fast (" in told
    assert "stage.llm.lr 0.001 0.003" in told
    assert told.count("Loss per supervised token") == 1
    assert OVER_TOKENS not in page_of(tmp_path, *runs)
    leave_run(tmp_path / "larger", num_steps=50, tokens_per_step=9000)
    assert OVER_TOKENS in page_of(tmp_path, *runs, tmp_path / "larger")


OVER_TOKENS = '<span class="axis">tokens</span>'
RUNS = {"slow": "1e-3", "fast": "3e-3"}


def test_a_folder_of_runs_is_all_of_them(tmp_path):
    """As the demo's: its contact sheet lies beside the runs."""
    folder = tmp_path / "demo"
    for number, stage in enumerate(("stage1", "stage2", "stage3")):
        leave_run(folder / stage, num_steps=20, stage=stage, hours=number)
    (folder / "data").mkdir()
    Image.new("L", (3000, 40), 200).save(folder / "contact_sheet.png")
    page = page_of(tmp_path, folder)
    told = _Tags(page).text
    assert told.index("stage1") < told.index("stage2") < told.index("stage3")
    assert told.count("Loss per supervised token") == 3
    assert 'width="1400" height="19"' in page
    assert "3 runs" in told


def test_what_cannot_be_done_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere is no folder  -> name run folders"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match=r"--output .*a is no folder  -> mkdir -p it"):
        main([str(tmp_path), "--output", str(tmp_path / "a" / "b.html")])


def test_thousands_of_steps_stay_a_small_page(tmp_path):
    run = leave_run(tmp_path / "run", num_steps=6000)
    page = page_of(tmp_path, run)
    print(f"6,000 steps: {len(page) / 1e3:.0f} kB")
    assert len(page) < 250_000


def test_time_between_steps_and_between_starts_is_told_apart(tmp_path):
    run = read_run(leave_run(tmp_path / "run", num_steps=300), "run")
    spent = time_shares(run)
    assert spent["waiting for data"] == pytest.approx(300 * 0.1)
    assert spent["compute and waiting for ranks"] == pytest.approx(300 * 0.9)
    assert spent["stopped, starting or lost"] == pytest.approx(3600, rel=0.01)
    assert spent[BETWEEN] == pytest.approx(298 * 0.5, rel=0.01)


values = st.lists(
    st.floats(-1e12, 1e12, allow_subnormal=False).filter(lambda x: abs(x) > 1e-9 or x == 0),
    min_size=1,
    max_size=50,
)


@given(values, st.booleans())
def test_an_axis_shows_all_values_between_a_few_round_ticks(numbers, is_log):
    array = np.abs(np.array(numbers)) + 1e-9 if is_log else np.array(numbers)
    axis = Axis.over(array, is_log=is_log)
    places = axis.places(array)
    assert ((places >= 0) & (places <= 1)).all()
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert all(-0.01 <= tick.place <= 100.01 for tick in ticks)
    assert [tick.place for tick in ticks] == sorted(tick.place for tick in ticks)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (1, "1"), (2.346, "2.35"), (12.0, "12"), (999.6, "1k"), (1234, "1.23k"),
        (45600, "45.6k"), (1.2e6, "1.2M"), (7.2e12, "7.2T"), (3e15, "3000T"), (0.0789, "0.0789"),
        (0.001, "0.001"), (5e-5, "5e-5"), (1.234e-6, "1.23e-6"), (-4200, "-4.2k"),
    ],
)  # fmt: skip
def test_numbers_are_written_short(number, text):
    assert compact(number) == text


@given(st.integers(2, 3000), st.integers(0, 2**31))
def test_no_extreme_is_lost_by_thinning(num_points, seed):
    """A spike of one step in thousands is drawn to its full height."""
    y = np.random.default_rng(seed).normal(size=num_points)
    spike = seed % num_points
    y[spike] = 50.0
    x = np.arange(num_points, dtype=float)
    curve = line_chart("t", [Series("s", x, y, 0)], x_label="step").curves[0]
    heights = heights_of(curve.line)
    assert len(heights) <= 2 * NUM_COLUMNS
    assert min(heights) <= 45  # of 1000: the spike, near the top


def heights_of(path: str) -> list[int]:
    """The upright places of a path's points, from the top."""
    start, _, moves = path[1:].partition("l")
    steps = [int(number) for number in re.findall(r"-?\d+", moves)][1::2]
    return list(np.cumsum([int(start.split()[1]), *steps]))


def test_running_means():
    means = running_means(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 3)
    assert means.tolist() == [1.0, 1.5, 2.0, 3.0, 4.0]


def test_steps_without_an_update_are_those_of_spikes_too(tmp_path):
    folder = leave_run(tmp_path / "run", num_steps=20)
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[3] |= {"grad_norm": None, "skipped": "a spike"}
    lines[5] |= {"loss": None, "grad_norm": None, "skipped": "not finite"}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = facts(read_run(folder, "run"), datetime.now().astimezone())
    assert found["Steps without update"] == "2"


def test_the_newest_events_are_marked_in_charts():
    """Starts among them, but not the first."""
    skipped = [{"what": "update_skipped", "step": step} for step in range(100)]
    events = [{"what": "started", "step": 0}, *skipped, {"what": "started", "step": 90}]
    marks = marks_of(SimpleNamespace(events=[*events, {"what": "saved", "step": 95}]))
    assert len(marks) == MOST_MARKS
    assert marks[-2:] == [(99.0, "update skipped at step 99"), (90.0, "started at step 90")]
    assert marks_of(SimpleNamespace(events=events[:1])) == []

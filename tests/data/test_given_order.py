"""An order in a file: what a plan writes trains as the plan does, and what cannot be is refused."""

import numpy as np
import pytest

from triptych.configs.schema import Oversize
from triptych.data.dataset.sizes import sizes_of
from triptych.data.plan import passes
from triptych.data.plan.given_order import GivenOrder, export_order
from triptych.data.plan.order import Cursor, Plan
from triptych.data.plan.passes import remember_in
from triptych.data.plan.plan_sources import PlanSource
from triptych.errors import DataError

GOOD = [(0, 0, 3), (0, 1, 0), (1, 0, 3), (2, 1, 2), (2, 1, 2)]


def of_plan(max_epochs=None):
    sources = []
    for name, tokens in {"a": [10, 20, 30, 40, 120], "b": [25] * 7}.items():
        counts = np.array(tokens)
        sources.append(PlanSource(name, 0.5, sizes_of(counts, counts % 9, counts), max_epochs))
    settings = {"seed": 0, "seq_len": 100, "max_patches": 50, "window": 16}
    return {"sources": sources, "oversize": Oversize.skip, **settings}


def given(tmp_path, rows, dtype=np.int64, **more):
    np.save(tmp_path / "order.npy", np.array(rows, dtype=dtype))
    return GivenOrder(tmp_path / "order.npy", **{**of_plan(), **more})


@pytest.mark.parametrize("max_epochs", [None, 2])
def test_what_a_plan_writes_is_read_as_the_same_packs(tmp_path, max_epochs):
    plan, file = Plan(**of_plan(max_epochs)), tmp_path / "order.npy"
    written = export_order(plan, file, 50)
    assert written == (50 if max_epochs is None else len(plan.first_packs(50)))
    order = GivenOrder(file, **of_plan())
    assert order.first_packs(1000) == plan.first_packs(written)
    assert order.ends
    assert order.expected_tokens == sum(pack.num_tokens for pack in plan.first_packs(written))
    assert order.workload(order.first_packs(1)[0]) == plan.workload(plan.first_packs(1)[0])
    assert order.hash != plan.hash


def test_it_goes_on_from_any_place_to_its_end(tmp_path):
    order = given(tmp_path, GOOD)
    whole, end = order.next_packs(order.start, 99)
    assert [pack.samples for pack in whole] == [((0, 3), (1, 0)), ((0, 3),), ((1, 2), (1, 2))]
    assert [pack.num_tokens for pack in whole] == [65, 40, 50]
    for first in range(4):
        packs, cursor = order.next_packs(order.start, first)
        rest, last = order.next_packs(Cursor.from_json(cursor.to_json()), 99)
        assert packs + rest == whole
        assert last == end
    assert order.is_over(end)
    assert order.next_packs(end, 1) == ([], end)


def test_other_rows_are_another_order(tmp_path):
    hashes = [given(tmp_path, rows).hash for rows in (GOOD, GOOD[:-1], [*GOOD[:-1], (2, 1, 3)])]
    assert len(set(hashes)) == 3


def test_rows_that_were_checked_are_hashed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "WORTH_REMEMBERING", 0)
    remember = remember_in([tmp_path / "kept"])
    checked = []
    check = GivenOrder._check_numbers
    monkeypatch.setattr(
        GivenOrder, "_check_numbers", lambda *a: checked.append(a[1].tolist()) or check(*a)
    )
    first, again = [given(tmp_path, GOOD, remember=remember) for _ in range(2)]
    assert len(checked) == 1
    assert again.hash == first.hash == given(tmp_path, GOOD).hash
    assert again.expected_tokens == first.expected_tokens == 65 + 40 + 50
    assert again.first_packs(9) == first.first_packs(9)
    with pytest.raises(DataError, match=r"65 tokens and .*seq_len=64"):
        given(tmp_path, GOOD, remember=remember, seq_len=64)
    for _ in range(2):  # what was refused is not remembered
        with pytest.raises(DataError, match="the source has no such sample"):
            given(tmp_path, [*GOOD[:-1], (2, 1, 7)], remember=remember)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, 0, 0)], r"row 0: .* = \[1, 0, 0\], but packs count from 0"),
        ([(-1, 0, 0)], r"row 0: .* but packs count from 0"),
        (
            [(0, 0, 0), (2, 0, 0)],
            r"row 1: .* but packs count from 0, and the rows of one stand tog",
        ),
        ([(0, 0, 0), (1, 0, 0), (0, 0, 1)], r"row 2: .*but packs count"),
        ([(0, 2, 0)], r"row 0: .*but sources are 0 to 1, in the order of the mixture"),
        ([(0, 0, 0), (0, -1, 0)], r"row 1: .*but sources are 0 to 1"),
        ([(0, 1, 7)], r"row 0: .*but the source has no such sample"),
        ([(0, 1, -1)], r"row 0: .*but the source has no such sample"),
        ([(0, 0, 0), (1, 1, 0), (1, 0, 3), (1, 0, 3)], r"pack 1: 105 tokens and .*seq_len=100 and"),
        ([(0, 0, 4)], r"pack 0: 120 tokens"),
        ([(0, 0)], r"of shape \(1, 2\), not \(num_samples, 3\) int64"),
        (np.empty((0, 3)), r"of shape \(0, 3\)"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        given(tmp_path, rows)


def test_a_file_that_is_none_is_refused(tmp_path):
    file = tmp_path / "order.npy"
    with pytest.raises(DataError, match="cannot be read"):
        GivenOrder(file, **of_plan())
    given(tmp_path, GOOD)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match="cannot be read"):
        GivenOrder(file, **of_plan())
    with pytest.raises(DataError, match="float64 of shape"):
        given(tmp_path, GOOD, float)


def test_a_place_of_another_plan_is_refused(tmp_path):
    order = given(tmp_path, GOOD)
    for cursor in (Cursor((1, 2), (0, 0), num_packs=2), Cursor((0, 0), (0, 0), num_packs=9)):
        with pytest.raises(DataError, match="of another plan than"):
            order.next_packs(cursor, 1)

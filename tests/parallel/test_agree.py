"""Ranks come to one outcome: the same results, the same error, the same list of ranks."""

import pickle
import subprocess
import sys

import pytest

from triptych.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    StorageError,
    TrainingError,
    TriptychError,
)
from triptych.parallel.agree import (
    Ranks,
    SingleProcess,
    differing_ranks,
    on_every_rank,
    on_rank_0,
    ranks_where,
)
from triptych.tests.helpers.thread_ranks import on_ranks

ERRORS = (CheckpointError, ConfigError, DataError, StorageError, TrainingError)


def failing(rank: int, errors: dict[int, Exception]) -> int:
    if rank in errors:
        raise errors[rank]
    return rank * rank


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_get_all_results_where_all_succeed(world_size):
    def run(ranks: Ranks) -> tuple[list[int], int]:
        squares = on_every_rank(ranks, lambda: ranks.rank**2, os_error=DataError)
        return squares, on_rank_0(ranks, lambda: ranks.rank + 7, os_error=DataError)

    assert on_ranks(world_size, run) == [([rank**2 for rank in range(world_size)], 7)] * world_size


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("failed", [[0], [2], [1, 2]])
def test_all_raise_the_error_of_the_ranks_that_failed(error, failed):
    errors = {rank: error(f"no {rank}") for rank in failed}
    outcomes = on_ranks(
        3,
        lambda ranks: on_every_rank(
            ranks, lambda: failing(ranks.rank, errors), os_error=TriptychError
        ),
    )
    assert [type(outcome) for outcome in outcomes] == [error] * 3
    message = "\n".join(f"rank {rank}: no {rank}" for rank in failed)
    assert {str(outcome) for outcome in outcomes} == {message}


def test_the_first_rank_that_failed_decides_the_type():
    errors = {1: OSError(28, "No space left"), 2: DataError("spoilt")}
    outcomes = on_ranks(
        3,
        lambda ranks: on_every_rank(
            ranks, lambda: failing(ranks.rank, errors), os_error=CheckpointError
        ),
    )
    assert [type(outcome) for outcome in outcomes] == [CheckpointError] * 3
    assert str(outcomes[0]) == "rank 1: [Errno 28] No space left\nrank 2: spoilt"


@pytest.mark.parametrize("error", [*ERRORS, OSError])
def test_what_rank_0_fails_at_all_fail_at(error):
    outcomes = on_ranks(
        3,
        lambda ranks: on_rank_0(
            ranks, lambda: failing(ranks.rank, {0: error("no")}), os_error=StorageError
        ),
    )
    expected = StorageError if error is OSError else error
    assert [type(outcome) for outcome in outcomes] == [expected] * 3
    assert {str(outcome) for outcome in outcomes} == {"no"}


def test_an_oserror_without_a_word_is_named_by_its_type():
    with pytest.raises(DataError, match=r"^rank 0: TimeoutError$"):
        on_every_rank(SingleProcess(), lambda: failing(0, {0: TimeoutError()}), os_error=DataError)


def test_our_own_mistakes_travel_as_they_are():
    with pytest.raises(ZeroDivisionError):
        on_rank_0(SingleProcess(), lambda: 1 // 0, os_error=DataError)


@pytest.mark.parametrize(
    ("values", "differing"), [("aaaa", []), ("aaba", [2]), ("baaa", [1, 2, 3]), ("a", [])]
)
def test_ranks_that_decided_otherwise_than_rank_0_are_named(values, differing):
    outcomes = on_ranks(len(values), lambda ranks: differing_ranks(ranks, values[ranks.rank]))
    assert outcomes == [differing] * len(values)
    where = on_ranks(len(values), lambda ranks: ranks_where(ranks, values[ranks.rank] == "a"))
    assert where == [[rank for rank, value in enumerate(values) if value == "a"]] * len(values)


def test_agreement_costs_no_torch():
    program = "import sys, triptych.checkpoints.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_every_error_survives_the_way_to_other_ranks():
    for error in ERRORS:
        assert pickle.loads(pickle.dumps(error)) is error  # ranks exchange the class, by its name

"""Every chunk of a model has one place, and one rank of each tensor-parallel column holds it."""

from itertools import product
from unittest.mock import Mock

import pytest
import torch

from triptych.parallel.agree import SingleProcess
from triptych.parallel.mesh import Dims, Mesh


def mesh_at(pp_rank: int, tp_rank: int, *, pp: int, tp: int) -> Mesh:
    """A rank's mesh without process groups."""
    dims = Dims(tp=tp, pp=pp, dp=1)
    place = (0, tp_rank, pp_rank, 0, torch.device("cpu"))
    return Mesh(dims, SingleProcess(), *place, *[Mock()] * 4)


@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 4, 3)])
def test_chunks_go_round_the_stages(tp: int, pp: int, vpp: int) -> None:
    held = {
        (pp_rank, tp_rank): mesh_at(pp_rank, tp_rank, pp=pp, tp=tp).places(vpp)
        for pp_rank, tp_rank in product(range(pp), range(tp))
    }
    for tp_rank in range(tp):
        in_order = [held[number % pp, tp_rank][number // pp] for number in range(pp * vpp)]
        assert [place.number for place in in_order] == list(range(pp * vpp))
        assert {(place.tp_rank, place.tp, place.num_chunks) for place in in_order} == {
            (tp_rank, tp, pp * vpp)
        }
        assert [place.is_first for place in in_order] == [True] + [False] * (pp * vpp - 1)
        assert [place.is_last for place in in_order] == [False] * (pp * vpp - 1) + [True]
    expected = [None] if vpp == 1 else list(range(vpp))
    assert all([place.vpp_rank for place in places] == expected for places in held.values())

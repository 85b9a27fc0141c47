"""Every chunk of a model has one place, and one rank of each tensor-parallel column holds it. And
what a device is asked for before it is there.
"""

import os
import runpy
from itertools import product
from unittest.mock import Mock

import pytest
import torch

from triptych.parallel import device
from triptych.parallel.agree import SingleProcess
from triptych.parallel.mesh import Dims, Mesh, tp_ranks_read_each_other
from triptych.tests.helpers.thread_ranks import ThreadRanks, on_ranks


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


@pytest.mark.parametrize(
    ("linked", "kind", "agreed"),
    [
        ({(0, 1), (1, 0), (2, 3), (3, 2)}, "cuda", True),
        ({(0, 1), (1, 0), (2, 3)}, "cuda", False),
        ({(0, 2), (2, 0), (1, 3), (3, 1)}, "cuda", False),
        (set(), "cpu", True),
    ],
)
def test_ranks_agree_whether_tp_groups_are_linked(linked, kind, agreed, monkeypatch) -> None:
    """Two tp groups of two; one device that cannot read its peer's memory is enough for all."""
    monkeypatch.setattr(
        "triptych.parallel.mesh.reads_memory_of",
        lambda device, index: index == device.index or (device.index, index) in linked,
    )

    def ask(ranks: ThreadRanks) -> bool:
        dims, rank = Dims(tp=2, pp=1, dp=2), ranks.rank
        device = torch.device(kind, rank)
        mesh = Mesh(dims, ranks, rank, rank % 2, 0, rank // 2, device, *[Mock()] * 4)
        return tp_ranks_read_each_other(mesh)

    assert on_ranks(4, ask) == [agreed] * 4


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "a_user's"}, {"PYTORCH_ALLOC_CONF": "a_user's"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a_user's"}, {"PYTORCH_CUDA_ALLOC_CONF": "a_user's"}),
    ],
    ids=["nothing", "by its name", "by its older name"],
)
def test_memory_may_grow_unless_the_user_asks_for_something_else(asked, expected, monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(device.__file__)
    assert {name: os.environ[name] for name in names if name in os.environ} == expected

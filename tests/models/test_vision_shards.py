"""The ViT with its patches cut over tp ranks: same result, same gradients, fewer bytes kept."""

from itertools import starmap

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from triptych.configs.model_schema import ModelConfig, VisionConfig
from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.data.patch_layout import PatchLayout
from triptych.models.fake_rank import saved_storages
from triptych.models.init import init_parameters
from triptych.models.kernels import Installed, choose
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.qwen_vl.vision import VisionTower
from triptych.models.sharding import TensorSharding, unshard
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.single import alone

VISION = VisionConfig(depth=2, hidden_size=96, num_heads=12, intermediate_size=384)
SHARDING = sharding_table(ModelConfig(name="small", vision=VISION))
GRIDS = {"4 patches": [(1, 2, 2)], "56 patches": [(1, 4, 6), (2, 2, 4), (1, 8, 2)]}
"""Neither number is a multiple of 3."""
BAR = 5e-6
"""Largest difference / largest element; measured: 1.5e-6 at most."""

Measured = tuple[Tensor, dict[str, Tensor], int]


def measure(tp: int, sharded: bool, grids: list[tuple[int, int, int]]) -> Measured:
    """Output, gradients as megatron-core sums them, bytes kept for the backward pass."""
    mesh = build_mesh(tp, 1, seed=0, timeout_s=HANG_S)
    table = choose(Kernels.auto, Precision.fp32, Installed.here())
    parallel = ParallelConfig(tp=tp, sequence_parallel=sharded)
    tower = VisionTower(VISION, parallel, Precision.fp32, mesh.places(1)[0], table)
    chunk = nn.ModuleDict({"vision": tower})
    init_parameters([chunk], SHARDING, mesh, 0)
    generator = torch.Generator().manual_seed(0)
    num_patches = sum(starmap(lambda t, h, w: t * h * w, grids))
    pixels = torch.randint(
        256, (num_patches, VISION.patch_dim), dtype=torch.uint8, generator=generator
    )
    upstream = torch.randn(num_patches, VISION.hidden_size, generator=generator)
    with saved_storages(tower) as kept:
        output = tower(pixels, PatchLayout.of(torch.tensor(grids), VISION))
    num_bytes = sum(storage.nbytes() for storage in kept)
    output.backward(upstream)
    grads = {name: p.grad for name, p in chunk.named_parameters()}
    for name, parameter in chunk.named_parameters():
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grads[name], group=mesh.tp_group)
    return output.detach(), grads, num_bytes


@pytest.mark.distributed
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tp", [2, 3])
def test_equals_one_rank(tp, sharded, grids, pool):
    with alone():
        want, want_grads, _ = measure(1, False, grids)
    pieces = pool(tp).run(measure, tp=tp, sharded=sharded, grids=grids)
    for output, _, _ in pieces:
        assert apart(output, want) <= BAR
    for name, want_grad in want_grads.items():
        own = [grads[name] for _, grads, _ in pieces]
        if SHARDING[name] is TensorSharding.REPLICATED:
            assert all(torch.equal(grad, own[0]) for grad in own), "replicas get one gradient"
        assert apart(unshard(own, SHARDING[name]), want_grad) <= BAR, name


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max()) / float(want.abs().max())


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "share"), [(2, 0.72), (4, 0.47)])
def test_pays(tp, share, pool):
    """Pixels, norms and residuals no longer lie on every rank."""
    grids = [(1, 16, 16)]
    [(_, _, whole), *_] = pool(tp).run(measure, tp=tp, sharded=False, grids=grids)
    [(_, _, sharded), *_] = pool(tp).run(measure, tp=tp, sharded=True, grids=grids)
    print(f"tp {tp}: {sharded / whole:.3f} of the bytes")
    assert sharded / whole == pytest.approx(share, abs=0.02)

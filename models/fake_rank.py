"""One rank of a large run in this process, without the others, weights or memory.

torch's fake process group answers every collective at once, and fake tensors have shapes but no
values. So what a rank of a thousand builds and keeps can be counted on a laptop, in seconds.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.distributed.fake_pg import FakeStore

from triptych.configs.schema import Config, Kernels, Part
from triptych.costs.flops import Workload
from triptych.data.batch import Batch
from triptych.data.patch_layout import PatchLayout
from triptych.models.kernels import choose_here
from triptych.models.parameters import global_parameters, part_of
from triptych.models.qwen_vl.model import Qwen2VL
from triptych.parallel.dtypes import DTYPES
from triptych.parallel.mesh import ChunkPlace, Mesh, build_mesh, shutdown

from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

FAKE_SEED, FAKE_TIMEOUT_S = 0, 60
"""Nothing is drawn, and nobody waits."""


@dataclass(frozen=True, slots=True)
class ChunkCount:
    """What one model chunk of a rank was seen to hold."""

    parameters: dict[Part, int]
    saved_bytes: int
    """Of one microbatch between its forward and its backward pass: the storages of all tensors that
    autograd saved, each once, parameters excepted."""


def count_rank(
    config: Config, layers: Sequence[int], load: Workload, *, rank: int, world_size: int
) -> list[ChunkCount]:
    """Build the chunks of one rank, run one microbatch forward through each, and count.

    There must be no process group in this process.

    Args:
        config: of the run.
        layers: decoder layers of each chunk, as ``layers_per_chunk`` gives them.
        load: of the microbatch; its tokens lie in segments of equal length.
        rank: which one.
        world_size: of the run.
    """
    batch = _microbatch(config, load)
    with _alone_as(rank, world_size, config) as mesh, _without_values():
        return [
            _count(_chunk(config, layers, place), config, batch, mesh)
            for place in mesh.places(config.parallel.vpp)
        ]


@contextmanager
def _alone_as(rank: int, world_size: int, config: Config) -> Iterator[Mesh]:
    """This process as one of ``world_size`` ranks; the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel = config.parallel
    try:
        yield build_mesh(
            parallel.tp,
            parallel.pp,
            vpp=parallel.vpp,
            seed=FAKE_SEED,
            timeout_s=FAKE_TIMEOUT_S,
        )
    finally:
        shutdown()


@contextmanager
def _without_values() -> Iterator[None]:
    """Tensors are fake; megatron-core's random states, which have none, are left alone."""
    no_fork = mock.patch.object(CudaRNGStatesTracker, "fork", return_value=nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True), no_fork:
        yield


def _chunk(config: Config, layers: Sequence[int], place: ChunkPlace) -> Qwen2VL:
    """As ``build_model`` and ``Stage.freeze`` make it."""
    precision = config.train.precision
    kernels = choose_here(Kernels.auto, precision)
    model = Qwen2VL(config.model, config.parallel, precision, layers, place, kernels)
    for name, parameter in global_parameters([model]):
        parameter.requires_grad_(getattr(config.stage, part_of(name).value).train)
    return model


def _count(model: Qwen2VL, config: Config, batch: Batch, mesh: Mesh) -> ChunkCount:
    parameters = dict.fromkeys(Part, 0)
    for name, parameter in global_parameters([model]):
        parameters[part_of(name)] += parameter.numel()
    if not model.pre_process:
        model.set_input_tensor(_received(config, batch, mesh))
    with saved_storages(model) as kept:
        output = model(batch)
    assert output.requires_grad, "nothing before this stage trains"
    return ChunkCount(parameters, sum(storage.nbytes() for storage in kept))


@contextmanager
def saved_storages(model: nn.Module) -> Iterator[Collection[torch.UntypedStorage]]:
    """What autograd saves meanwhile: every storage once, the model's parameters excepted."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept.values()


def _received(config: Config, batch: Batch, mesh: Mesh) -> Tensor:
    """What the previous stage sends."""
    tokens = batch.num_tokens // (mesh.dims.tp if config.parallel.sequence_parallel else 1)
    return torch.zeros(
        tokens,
        1,
        config.model.language.hidden_size,
        dtype=DTYPES[config.train.precision],
        requires_grad=True,
    )


def _microbatch(config: Config, load: Workload) -> Batch:
    """A batch of the expected size: segments of equal length, images of equal size, text targets.

    Its tensors have values, as code on the CPU reads lengths from them.
    """
    num_tokens, num_patches = load.num_tokens, load.num_patches
    vision = config.model.vision
    merge, patch_dim = vision.spatial_merge_size, vision.patch_dim
    num_vision = num_patches // merge**2
    segment = load.token_pairs // num_tokens
    image = max(merge**2, load.patch_pairs // max(1, num_patches) // merge**2 * merge**2)
    images = [min(image, num_patches - start) for start in range(0, num_patches, image)]
    grid_thw = torch.tensor([[1, merge, patches // merge] for patches in images]).view(-1, 3)
    bounds = [*range(0, num_tokens, segment), num_tokens]
    return Batch(
        input_ids=torch.zeros(num_tokens, dtype=torch.int64),
        labels=torch.zeros(num_tokens, dtype=torch.int64),
        loss_mask=torch.arange(num_tokens) >= num_vision,
        supervised_index=torch.arange(num_vision, num_tokens),
        position_ids=torch.zeros(3, num_tokens, dtype=torch.int64),
        segments=bounds,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        grid_thw=grid_thw,
        patches=PatchLayout.of(grid_thw, vision),
        vision_index=torch.arange(num_vision),
        pixel_values=torch.zeros(num_patches, patch_dim, dtype=torch.uint8),
        patch_dim=patch_dim,
        sample_ids=(),
        num_tokens=num_tokens,
        num_patches=num_patches,
    )

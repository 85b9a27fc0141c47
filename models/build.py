"""From a configuration to this rank's chunks of the model."""

from collections.abc import Sequence

from triptych.configs.model_schema import ModelConfig
from triptych.configs.schema import ParallelConfig, Precision
from triptych.models.kernels import KernelTable
from triptych.models.qwen_vl.model import Qwen2VL
from triptych.parallel.mesh import Mesh


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    layers: Sequence[int],
    mesh: Mesh,
    kernels: KernelTable,
) -> list[Qwen2VL]:
    """This rank's ``parallel.vpp`` chunks, on its device, their weights not yet set.

    Draw them or load them.
    """
    chunks = [
        Qwen2VL(model, parallel, precision, layers, place, kernels)
        for place in mesh.places(parallel.vpp)
    ]
    for piece in chunks:
        piece.to(mesh.device)
    return chunks

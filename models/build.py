"""From a configuration to this rank's piece of the model."""

from triptych.configs.schema import ModelConfig, ParallelConfig, Precision
from triptych.models.qwen2_vl.model import Qwen2VL
from triptych.parallel.layout import layers_per_stage
from triptych.parallel.mesh import Mesh


def build_model(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision, mesh: Mesh, *, seq_len: int
) -> Qwen2VL:
    """This rank's piece, on its device, its weights not yet set: draw them or load them."""
    layers = layers_per_stage(model, parallel, seq_len=seq_len)
    return Qwen2VL(model, parallel, precision, layers, mesh).to(mesh.device)

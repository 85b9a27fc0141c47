"""From a configuration to this rank's piece of the model."""

from triptych.configs.schema import ModelConfig, ParallelConfig, Precision
from triptych.costs.layout import layers_per_stage
from triptych.models.qwen2_vl.model import Qwen2VL
from triptych.parallel.mesh import Mesh


def build_model(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision, mesh: Mesh, *, seq_len: int
) -> Qwen2VL:
    """This rank's piece, on its device, its weights not yet set: draw them or load them."""
    layers = layers_per_stage(model, parallel, seq_len=seq_len)
    piece = Qwen2VL(model, parallel, precision, layers, mesh)
    piece.to(mesh.device)
    return piece

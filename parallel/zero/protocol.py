"""What training asks of an optimizer that is sharded over the data-parallel ranks (ZeRO-1)."""

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from triptych.parallel.device import HAS_CUDA

FUSED = HAS_CUDA
"""Whether torch's AdamW, where it is the one, updates all weights in one kernel."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state, as torch and apex name it."""
STATE_KINDS = ("master", *MOMENTS)
"""fp32 weight and moments; checkpoints name them so."""
ParamState = dict[str, Tensor]
"""By kind: fp32 in host memory, each of the shape of this rank's parameter. 12 bytes per element,
which a device has no room for."""


class ShardedOptimizer(Protocol):
    """AdamW with fp32 master weights, its state sharded over the data-parallel ranks.

    Names are the global ones of ``models.parameters``. Tensors are this rank's tensor-parallel
    pieces, whole over dp.
    """

    chunks: Sequence[nn.Module]
    """The model, wrapped so that gradients are summed over the data-parallel ranks."""
    num_updates: dict[str, int]
    """Updates made so far, by part; Adam's step. Of what is frozen it means nothing."""

    def zero_grad(self) -> None:
        """Forget the gradients. Before each step's first microbatch."""

    def grad_norm(self) -> float:
        """L2 norm of the whole model's gradient, replicated and tied parameters counted once.

        A collective of all ranks.
        """

    def step(self, lr: Mapping[str, float], grad_norm: float) -> None:
        """Clip by ``grad_norm`` and update. ``lr`` by part. A collective of all ranks."""

    def local_grads(self) -> dict[str, Tensor]:
        """Reduced gradients by name. A collective of ``dp_group``."""

    def state_by_param(self, names: Container[str] | None = None) -> dict[str, ParamState]:
        """Optimizer state by name, of what trains, or of ``names`` only.

        A collective of ``dp_group``.
        """

    def load_state_by_param(
        self, state: Mapping[str, ParamState], num_updates: Mapping[str, int]
    ) -> None:
        """Take over the state of the named parameters; that of the others stays.

        ``num_updates`` is taken over for the parts that they belong to.
        """

    def gather_weights(self) -> None:
        """Wait for the updated weights of the other ranks, where their gathering overlaps.

        Before weights are read other than by a forward pass. A collective of ``dp_group``.
        """

    def refresh_master_weights(self) -> None:
        """Copy the model's weights to the master weights, after the weights were loaded."""

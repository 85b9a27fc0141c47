"""What training asks of an optimizer that is sharded over the data-parallel ranks (ZeRO-1)."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

PARTS = ("adapter", "llm", "vit")
"""Each has its own learning rate."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state, as torch and apex name it."""
ParamState = dict[str, Tensor]
"""``master``, ``exp_avg``, ``exp_avg_sq``: fp32, each of the shape of this rank's parameter."""


class ShardedOptimizer(Protocol):
    """AdamW with fp32 master weights, its state sharded over the data-parallel ranks.

    Names are the global ones of ``models.parameters``. Tensors are this rank's tensor-parallel
    pieces, whole over dp.
    """

    model: nn.Module
    """The model, wrapped so that gradients are summed over the data-parallel ranks."""
    num_updates: int
    """Updates made so far; Adam's step."""

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

    def state_by_param(self) -> dict[str, ParamState]:
        """Optimizer state by name, of what trains. A collective of ``dp_group``."""

    def load_state_by_param(self, state: Mapping[str, ParamState], num_updates: int) -> None:
        """Take over the state of the named parameters; the others start fresh from the weights."""

    def refresh_master_weights(self) -> None:
        """Copy the model's weights to the master weights, after the weights were loaded."""

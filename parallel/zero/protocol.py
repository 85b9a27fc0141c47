"""What training asks of an optimizer that is sharded over the data-parallel ranks (ZeRO-1)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from triptych.configs.schema import PARTS, OptimizerConfig, Precision
from triptych.parallel.data_parallel import DataParallelModel
from triptych.parallel.dtypes import DTYPES
from triptych.parallel.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state, as torch and apex name it."""
STATE_KINDS = ("master", *MOMENTS)
"""fp32 weight and moments; checkpoints name them so."""


class StateShard(NamedTuple):
    """The range of a parameter whose optimizer state this dp rank owns."""

    start: int
    """In the flat parameter."""
    tensors: dict[str, Tensor]
    """By kind: (end - start,) fp32, where the optimizer has it. Whoever writes to it changes it."""


class ShardedOptimizer(ABC):
    """AdamW with fp32 master weights, its state sharded over the data-parallel ranks.

    Names are the global ones of ``models.parameters``. Tensors are this rank's tensor-parallel
    pieces, whole over dp. Every rank must build it, also one where nothing trains.
    """

    num_updates: dict[str, int]
    """Updates made so far, by part: Adam's step. It means nothing for what is frozen."""

    def __init__(
        self, model: DataParallelModel, config: OptimizerConfig, precision: Precision, mesh: Mesh
    ) -> None:
        """Begin at update 0.

        Args:
            model: this rank's chunks, wrapped for the kind of ZeRO that this is.
            config: betas, eps, decay and clipping.
            precision: of weights and activations; gradients and state are fp32.
            mesh: this rank's place.
        """
        self._model, self._config, self._mesh = model, config, mesh
        self._dtype = DTYPES[precision]
        self._trained = model.trained
        self.num_updates = dict.fromkeys(PARTS, 0)

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients. Before each step's first microbatch."""

    @abstractmethod
    def squared_grad_norm(self, veto: Tensor | None = None) -> Tensor:
        """Squared L2 norm of the whole model's gradient; copies of a parameter count once.

        0-d float64, on the device: nobody has waited for it. A collective of all ranks.

        Args:
            veto: 0-d bool, on the device. True on any rank makes the result -inf on all of them,
                or NaN where a gradient is not finite either.
        """

    @abstractmethod
    def step(self, lr: Mapping[str, float], grad_norm: float) -> None:
        """Clip by ``grad_norm`` and update. ``lr`` by part. A collective of all ranks."""

    @abstractmethod
    def local_grads(self) -> dict[str, Tensor]:
        """Reduced gradients by name. A collective of ``dp_group``."""

    @abstractmethod
    def state_shards(self) -> dict[str, StateShard]:
        """What this rank owns of the state, by name; moments are zeros before the first update."""

    @abstractmethod
    def take_over_updates(self, names: Iterable[str], num_updates: Mapping[str, int]) -> None:
        """Go on counting where whoever had the state of ``names`` stood; for their parts only."""

    @abstractmethod
    def gather_weights(self) -> None:
        """Wait for the updated weights of the other ranks, where their gathering overlaps.

        Before weights are read other than by a forward pass. A collective of ``dp_group``.
        """

    @abstractmethod
    def refresh_master_weights(self) -> None:
        """Copy the model's weights to the master weights, after the weights were loaded."""

    def _squared_norm(
        self, grads: Sequence[Tensor], copies: Sequence[Tensor], veto: Tensor | None
    ) -> Tensor:
        """Of what all ranks give together. A collective of all ranks.

        The norm of the tensors' norms. Both libraries' own wait for the device, once for each
        tensor or parameter group. Of ``copies``, which another rank counts, only a number that
        is not finite shows: a bit may have flipped in one of them alone.
        """
        zero = torch.zeros((), device=self._mesh.device)
        squared = (get_total_norm(grads) if grads else zero).square()
        if copies:
            squared = squared + 0 * get_total_norm(copies)
        if veto is not None:
            squared = squared.masked_fill(veto, -math.inf)
        dist.all_reduce(squared)
        return squared.double()

    def _updates_of(self, names: Iterable[str], num_updates: Mapping[str, int]) -> None:
        """Set ``num_updates`` for the parts that ``names`` belong to."""
        parts = {self._model.parts[name] for name in names}
        self.num_updates |= {part: num_updates[part] for part in parts}

    def _count_update(self) -> None:
        """One update was made, of all parts."""
        self.num_updates = {part: count + 1 for part, count in self.num_updates.items()}


def fuses(device: torch.device) -> bool:
    """Whether torch's AdamW, where it is the one, updates all weights in one kernel."""
    return device.type == "cuda"

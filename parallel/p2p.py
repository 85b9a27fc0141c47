"""Messages between pipeline stages whose shapes are known beforehand.

megatron-core lets stages tell each other the shape of every tensor when lengths vary: a message
more for each, forth and back. Here every stage plans the same packs, so it knows the lengths of all
microbatches of a step before 1F1B starts, and looks shapes up by microbatch index. See
docs/adr/0006-lengths-are-planned.md.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

Shape = list[int]


class PlannedP2P(P2PCommunicator):
    """Sends and receives for one step of 1F1B. Microbatches arrive in order, forth and back."""

    def __init__(
        self, pp_group: ProcessGroup, config: ModelParallelConfig, shapes: Sequence[Shape]
    ) -> None:
        """Begin a step.

        Args:
            pp_group: the stages.
            config: megatron-core's, of this stage.
            shapes: of what passes between stages, by microbatch: [T, 1, H], T / tp with sequence
                parallelism.
        """
        super().__init__(pp_group=pp_group, config=config)
        self._forward, self._backward = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[Shape, Shape]:
        """Of the next activation from the stage before, of the next gradient from the one after."""
        nothing = [0, 0, 0]
        return (
            next(self._forward) if recv_prev else nothing,
            next(self._backward) if recv_next else nothing,
        )

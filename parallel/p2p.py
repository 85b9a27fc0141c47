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
from megatron.core.pipeline_parallel.schedules import get_schedule_table

MessageShape = list[int]


class PlannedP2P(P2PCommunicator):
    """Sends and receives for one step of 1F1B, interleaved or not."""

    def __init__(
        self,
        pp_group: ProcessGroup,
        config: ModelParallelConfig,
        shapes: Sequence[MessageShape],
        num_chunks: int = 1,
    ) -> None:
        """Begin a step.

        Args:
            pp_group: the stages.
            config: megatron-core's, of this stage.
            shapes: of what passes between stages, by microbatch: [T, 1, H], T / tp with sequence
                parallelism.
            num_chunks: of the model on each stage.
        """
        super().__init__(pp_group=pp_group, config=config)
        first, last = 0, pp_group.size() - 1
        order = _order(len(shapes), num_chunks, config)
        # What leaves the last chunk, forth or back, comes round to nobody: the stage after it,
        # which is the first or last of all, has one chunk less to receive for.
        inner = [microbatch for microbatch, chunk in order if chunk < num_chunks - 1]
        every = [microbatch for microbatch, _ in order]
        self._forward = (shapes[i] for i in (inner if pp_group.rank() == first else every))
        self._backward = (shapes[i] for i in (inner if pp_group.rank() == last else every))

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[MessageShape, MessageShape]:
        """Shapes of the next activation from the stage before, and of the next gradient."""
        nothing = [0, 0, 0]
        return (
            next(self._forward) if recv_prev else nothing,
            next(self._backward) if recv_next else nothing,
        )


def _order(
    num_microbatches: int, num_chunks: int, config: ModelParallelConfig
) -> list[tuple[int, int]]:
    """(microbatch, chunk) as every stage runs them; backward the same, chunks counted from behind.

    Groups of microbatches pass one chunk after the other.
    """
    order: list[tuple[int, int]] = get_schedule_table(
        num_microbatches, num_chunks, config.microbatch_group_size_per_vp_stage
    )
    return order

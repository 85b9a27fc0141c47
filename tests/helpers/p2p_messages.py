"""What travels between pipeline stages in a step, with planned shapes and with a handshake."""

from unittest import mock

import torch
import torch.distributed as dist

from triptych.parallel import schedule
from triptych.parallel.p2p import PlannedP2P
from triptych.tests.helpers.layouts import Layout, LayoutCase, engine_of, make_step
from triptych.train.step import microbatch_losses

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

LAYOUTS = [
    Layout(pp=2, layers=(1, 3)),
    Layout(pp=4, layers=(1, 1, 1, 1)),
    Layout(tp=2, pp=2, layers=(2, 2), sequence_parallel=True),
]


def handshake(pp_group, config, shapes, num_chunks):
    """megatron-core's own communicator, which asks for every shape."""
    return P2PCommunicator(pp_group=pp_group, config=config)


def count_messages(layout: Layout, planned: bool) -> tuple[float, int, set[int], float]:
    """Loss sum, tensors sent by this rank, their lengths, and the gradient norm."""
    engine = engine_of(LayoutCase(layout))
    mesh = engine.mesh
    step = make_step("some", mesh, 1)
    assert len({len(batch.input_ids) for batch in step.microbatches}) > 1, "unequal lengths"
    sent: list[torch.Tensor] = []
    batched = dist.batch_isend_irecv

    def counting(operations):
        sent.extend(op.tensor for op in operations if op.op is dist.isend)
        return batched(operations)

    with (
        mock.patch.object(dist, "batch_isend_irecv", counting),
        mock.patch.object(schedule, "PlannedP2P", PlannedP2P if planned else handshake),
    ):
        engine.optimizer.zero_grad()
        loss = microbatch_losses(engine.chunks, step.microbatches, mesh, forward_only=False).sum()
    lengths = {tensor.size(0) for tensor in sent if tensor.is_floating_point()}
    norm = float(engine.optimizer.squared_grad_norm()) ** 0.5
    return float(loss), len(sent), lengths, norm

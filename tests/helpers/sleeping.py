"""A pipeline whose stages sleep instead of computing, under the real schedule: who waits, and when.

Sleeping takes no core, so any machine can run any number of stages, and passes take as long as they
are told to. Or they only count the time: each stage has a clock of its own, a message carries the
time at which it was sent, and whoever receives it has waited until then. Counted times are the same
on any machine, however busy; what they leave out is what messages themselves cost.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from triptych.configs.schema import Kernels, ParallelConfig, Precision
from triptych.costs.pipeline_schedule import Event
from triptych.models.kernels import Installed, choose
from triptych.models.qwen_vl.transformer_configs import language_transformer
from triptych.parallel.mesh import Mesh, build_mesh
from triptych.parallel.schedule import run_microbatches
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.reference import small_model

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule

NUM_TOKENS = 8


class SleepingClock:
    """Real time, the same on all stages."""

    def sleep(self, seconds: float) -> tuple[float, float]:
        """Let this time pass; returns when it began and ended."""
        start_s = time.perf_counter()
        time.sleep(seconds)
        return start_s, time.perf_counter()

    def receive(self, sent_s: float) -> None:
        """Whoever received this message has waited for it."""


class CountingClock:
    """Time of one stage, which passes at once."""

    def __init__(self) -> None:
        """Begin at 0."""
        self._now_s = 0.0

    def sleep(self, seconds: float) -> tuple[float, float]:
        """Count this time; returns when it began and ended."""
        start_s = self._now_s
        self._now_s += seconds
        return start_s, self._now_s

    def receive(self, sent_s: float) -> None:
        """Count the time that passed until this message was sent."""
        self._now_s = max(self._now_s, sent_s)


Clock = SleepingClock | CountingClock


class SleepingChunk(MegatronModule):
    """Lets time pass, and tells the next stage when that was over."""

    clock: Clock

    def __init__(
        self,
        config: Any,
        mesh: Mesh,
        chunk: int,
        is_last: bool,
        seconds: NDArray[np.float64],
        log: list[Event],
    ) -> None:
        """Sleep for seconds[is_backward, microbatch]; write every pass into ``log``."""
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self._stage, self._chunk, self._seconds, self._log = mesh.pp_rank, chunk, seconds, log
        self._input: Tensor | None = None
        self.is_last = is_last

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's output; called by megatron-core's schedule."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, microbatch: int) -> Tensor:
        h_T1H = self._input
        if h_T1H is None:
            h_T1H = torch.zeros(NUM_TOKENS, 1, self.config.hidden_size, requires_grad=True)
        else:
            self.clock.receive(h_T1H.flatten()[0].item())
        slept: Tensor = _Sleep.apply(h_T1H, self, microbatch)
        return slept

    def sleep(self, microbatch: int, is_backward: bool) -> float:
        start_s, end_s = self.clock.sleep(self._seconds[int(is_backward), microbatch])
        event = (self._stage, self._chunk, microbatch, is_backward, start_s, end_s)
        self._log.append(Event(*event))
        return end_s


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_T1H: Tensor, chunk: SleepingChunk, microbatch: int) -> Tensor:
        ctx.chunk, ctx.microbatch = chunk, microbatch
        return torch.full_like(h_T1H, chunk.sleep(microbatch, False))

    @staticmethod
    def backward(ctx: Any, grad_T1H: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.chunk.is_last:  # whose gradient is the loss's own, no message
            ctx.chunk.clock.receive(grad_T1H.flatten()[0].item())
        return torch.full_like(grad_T1H, ctx.chunk.sleep(ctx.microbatch, True)), None, None


def run_sleeping(
    forward_s: Sequence[Any],
    backward_s: Sequence[Any],
    num_microbatches: int,
    num_rounds: int,
    clock: type[Clock] = SleepingClock,
) -> list[list[Event]]:
    """One step after another. Every rank must call this; each is a stage.

    Args:
        forward_s: (vpp, pp) or (vpp, pp, num_microbatches) seconds of sleep.
        backward_s: the same.
        num_microbatches: of each step.
        num_rounds: how many steps.
        clock: whether time passes or is counted.

    Returns:
        This stage's passes, in each round; times of all ranks can be compared.
    """
    shape = (len(forward_s), dist.get_world_size(), num_microbatches)
    given = [np.asarray(seconds, dtype=np.float64) for seconds in (forward_s, backward_s)]
    by_pass = [s if s.ndim == 3 else np.broadcast_to(s[:, :, None], shape) for s in given]
    vpp, pp, _ = shape
    mesh = build_mesh(1, pp, vpp=vpp, seed=0, timeout_s=HANG_S)
    small = small_model(heads=2, kv_heads=2, tied=False).language
    language, parallel = replace(small, num_layers=pp * vpp), ParallelConfig(pp=pp, vpp=vpp)
    table = choose(Kernels.auto, Precision.fp32, Installed.here())
    config = language_transformer(language, parallel, Precision.fp32, [1] * (pp * vpp), table)
    log: list[Event] = []
    chunks = [
        SleepingChunk(
            config, mesh, i, place.is_last, np.stack([s[i, mesh.pp_rank] for s in by_pass]), log
        )
        for i, place in enumerate(mesh.places(vpp))
    ]
    rounds = []
    for _ in range(num_rounds):
        log.clear()
        dist.barrier()
        _step(chunks, num_microbatches, mesh, clock())
        rounds.append(list(log))
    return rounds


def measured_bubble(stages: Sequence[Sequence[Event]]) -> float:
    """Share of the stages' time, from the first pass to the last, in which they run none."""
    events = [event for stage in stages for event in stage]
    begin, end = min(event.start_s for event in events), max(event.end_s for event in events)
    busy = sum(event.end_s - event.start_s for event in events)
    return 1 - busy / (len(stages) * (end - begin))


def _step(chunks: Sequence[SleepingChunk], num_microbatches: int, mesh: Mesh, clock: Clock) -> None:
    for chunk in chunks:
        chunk.clock = clock

    def forward(chunk: SleepingChunk, microbatch: int) -> tuple[Tensor, Any]:
        one = torch.ones((), dtype=torch.int32)
        return chunk(microbatch), lambda output: (output.sum(), one, None)

    lengths = [NUM_TOKENS] * num_microbatches
    feeds = [iter(range(num_microbatches)) for _ in chunks]
    run_microbatches(chunks, feeds, lengths, forward, mesh, forward_only=False)

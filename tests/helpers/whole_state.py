"""Optimizer state by parameter, whole over dp: what no run gathers, and tests compare and carry."""

from collections.abc import Mapping

from torch import Tensor

from triptych.parallel.zero.gather import gather_whole
from triptych.parallel.zero.protocol import STATE_KINDS
from triptych.train.engine import Engine

ParamState = dict[str, Tensor]
"""By kind: fp32 in host memory, each of the shape of this rank's parameter."""


def whole_state(engine: Engine) -> dict[str, ParamState]:
    """State of what trains, by name. Every rank of ``dp_group`` must call this."""
    shards = engine.optimizer.state_shards()
    trained = {name: p for name, p in engine.parameters.items() if p.requires_grad}
    whole = gather_whole(
        (
            (parameter, shards[name].tensors[kind], shards[name].start)
            if name in shards
            else (parameter, None, 0)
            for name, parameter in trained.items()
            for kind in STATE_KINDS
        ),
        engine.mesh,
    )
    return {name: {kind: next(whole) for kind in STATE_KINDS} for name in trained}


def load_whole_state(
    engine: Engine, state: Mapping[str, ParamState], num_updates: Mapping[str, int]
) -> None:
    """Take over the whole state of the named parameters; that of the others stays."""
    engine.optimizer.take_over_updates(state, num_updates)
    for name, (start, shard) in engine.optimizer.state_shards().items():
        for kind, values in shard.items() if name in state else ():
            values.copy_(state[name][kind].flatten()[start : start + len(values)])

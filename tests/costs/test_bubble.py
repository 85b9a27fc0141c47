"""The simulated pipeline against the real schedule: bubble and order.

Stages count the time that their passes take, so nothing here depends on how busy the machine is;
benchmarks/bubble.py measures the same with stages that sleep, and messages that take time.
"""

import numpy as np
import pytest

from triptych.costs.pipeline_schedule import Pass, ideal_bubble, pp_stage_passes, simulate
from triptych.tests.helpers.sleeping import CountingClock, measured_bubble, run_sleeping

pytestmark = pytest.mark.distributed

NUM_MICROBATCHES = 8
POINTS = 1e-6
"""What fp32, in which a message carries its time, leaves off."""
EVEN_2 = [[0.05, 0.05]]
EVEN_4 = [[0.05] * 4]
CHUNKS_2 = [[0.05, 0.05], [0.05, 0.05]]
UNEVEN_2 = [[0.08, 0.05]]
UNEVEN_4 = [[0.1, 0.05, 0.05, 0.07]]
BY_MICROBATCH = np.random.default_rng(0).uniform(0.05, 0.1, (1, 2, NUM_MICROBATCHES)).tolist()


@pytest.mark.parametrize(
    ("forward_s", "balanced"),
    [
        pytest.param(EVEN_2, True, id="2 stages"),
        pytest.param(EVEN_4, True, id="4 stages"),
        pytest.param(CHUNKS_2, True, id="2 stages of 2 chunks"),
        pytest.param(UNEVEN_2, False, id="2 uneven stages"),
        pytest.param(UNEVEN_4, False, id="4 uneven stages"),
        pytest.param(BY_MICROBATCH, False, id="uneven microbatches"),
    ],
)
def test_real_schedule_waits_as_long_as_planned(forward_s, balanced, pool):
    """Backward passes take twice as long."""
    vpp, pp = len(forward_s), len(forward_s[0])
    backward_s = (2 * np.asarray(forward_s)).tolist()
    ranks = pool(pp).run(
        run_sleeping,
        forward_s=forward_s,
        backward_s=backward_s,
        num_microbatches=NUM_MICROBATCHES,
        num_rounds=1,
        clock=CountingClock,
    )
    for stage, [events] in enumerate(ranks):
        order = pp_stage_passes(stage, pp=pp, vpp=vpp, num_microbatches=NUM_MICROBATCHES)
        assert [Pass(*event[1:4]) for event in events] == order

    found = measured_bubble([events for [events] in ranks])
    planned = simulate(forward_s, backward_s, num_microbatches=NUM_MICROBATCHES).bubble
    print(f"\nmeasured {found:.4f}, planned {planned:.4f}")
    assert found == pytest.approx(planned, abs=POINTS)
    if balanced:
        ideal = ideal_bubble(pp=pp, num_microbatches=NUM_MICROBATCHES, vpp=vpp)
        assert found == pytest.approx(ideal, abs=POINTS)

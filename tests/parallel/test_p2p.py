"""Messages between pipeline stages.

Half of what megatron-core's handshake takes, and the same result.
"""

import pytest

from triptych.tests.helpers.p2p_messages import LAYOUTS, count_messages


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_stage_asks_for_a_shape(pool, layout):
    ours = pool(layout.world_size).run(count_messages, layout=layout, planned=True)
    theirs = pool(layout.world_size).run(count_messages, layout=layout, planned=False)
    for (loss, count, lengths, norm), (loss_2, count_2, lengths_2, norm_2) in zip(
        ours, theirs, strict=True
    ):
        assert (loss, norm) == (loss_2, norm_2)
        assert 2 * count <= count_2
        assert lengths == lengths_2, "no padding beyond what the packs have"

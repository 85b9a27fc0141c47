"""The order of microbatches: a pure permutation, by which no simulated step gets longer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.configs.compose import load_config
from triptych.costs.communication import part_duration
from triptych.costs.flops import Workload
from triptych.costs.layer_split import layers_per_chunk
from triptych.costs.microbatch_order import pipeline_order
from triptych.costs.pipeline_schedule import simulate

LAYOUTS = {
    "pp2": ("parallel.pp=2",),
    "pp4": ("parallel.pp=4", "model.language.num_layers=8"),
    "pp2 interleaved": ("parallel.pp=2", "parallel.vpp=2"),
}
loads = st.builds(
    Workload,
    st.integers(1, 4096),
    st.integers(1, 10**6),
    st.integers(0, 16384),
    st.integers(0, 10**7),
)


def makespan(config, microbatches):
    chunks = [
        part_duration(config, load).of_chunks(layers_per_chunk(config)) for load in microbatches
    ]
    seconds = np.array([[(chunk.forward, chunk.backward) for chunk in each] for each in chunks])
    shape = (len(microbatches), config.parallel.vpp, config.parallel.pp, 2)
    forward, backward = seconds.reshape(shape).transpose(3, 1, 2, 0)
    return simulate(forward, backward, num_microbatches=len(microbatches)).makespan_s


@pytest.mark.parametrize("words", LAYOUTS.values(), ids=LAYOUTS)
def test_no_step_gets_longer_and_all_ranks_agree(words):
    config = load_config(["model=debug", *words])

    @settings(deadline=None, max_examples=5)
    @given(st.lists(loads, min_size=1, max_size=4).map(lambda some: 2 * some))
    def check(microbatches):
        order = pipeline_order(config)(microbatches)
        assert sorted(order) == list(range(len(microbatches)))
        assert order == pipeline_order(config)(microbatches)
        ordered = [microbatches[place] for place in order]
        assert makespan(config, ordered) <= makespan(config, microbatches)

    check()


def test_a_step_gets_shorter_where_images_come_in_a_row():
    """7B on 4 stages, half of the packs text and half images: 1.5 % of the step."""
    config = load_config(["model=qwen2_vl_7b", "parallel.tp=2", "parallel.pp=4", "stage=2"])
    images = [Workload(8192, 10**7, 16384, 2 * 10**7)] * 8
    text = [Workload(8192, 10**7, 0, 0)] * 8
    order = pipeline_order(config)(images + text)
    ordered = [(images + text)[place] for place in order]
    assert makespan(config, ordered) < 0.99 * makespan(config, images + text)


def test_one_stage_keeps_the_order_that_is_given():
    order = pipeline_order(load_config(["model=debug"]))
    assert order([Workload(1, 1, 0, 0), Workload(9, 81, 4, 16)]) == [0, 1]

"""Bytes and parameters of ranks, by sums done another way and by what must always hold.

That they are what real ranks hold is shown in test_fake_rank.py.
"""

from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.configs.compose import load_config
from triptych.configs.schema import Config
from triptych.costs.activation_memory import CPU, GPU, Activations
from triptych.costs.compute import expected_load
from triptych.costs.flops import parameters
from triptych.costs.layer_split import layers_per_chunk
from triptych.costs.memory import most_saved, pp_stage_memory
from triptych.costs.parameter_shards import ParameterShard, chunk_shards, pp_stage_shards, trained
from triptych.costs.pipeline_schedule import pp_stage_passes

GIB = 2**30


def run(*words: str) -> Config:
    return load_config(["model=qwen2_vl_72b", "parallel=tp8_pp8", *words])


def kept(config: Config, kernels=GPU) -> list[int]:
    """Bytes of a microbatch in each chunk."""
    activations = Activations(config, expected_load(config), kernels)
    return [chunk.total for chunk in activations.of_chunks(layers_per_chunk(config))]


@pytest.mark.parametrize("model", ["debug", "qwen2_vl_2b", "qwen2_vl_7b", "qwen2_vl_72b"])
@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 2, 1), (1, 4, 1), (2, 2, 2)])
def test_all_ranks_together_hold_the_model(model: str, tp: int, pp: int, vpp: int) -> None:
    """Sharded pieces tp times, replicated ones once; a tied head on another stage is a copy."""
    words = [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.vpp={vpp}"]
    config = load_config([f"model={model}", *words])
    whole = parameters(config.model)
    held = sum(
        (
            piece
            for pieces in chunk_shards(config, layers_per_chunk(config))
            for piece in pieces.values()
        ),
        ParameterShard(),
    )
    copies = whole.embedding if config.model.language.tie_word_embeddings and pp > 1 else 0
    assert tp * held.sharded + held.replicated == whole.total + copies


def test_a_stage_holds_its_chunks() -> None:
    config = run("parallel.vpp=2")
    layers = layers_per_chunk(config)
    chunks, stages = chunk_shards(config, layers), pp_stage_shards(config, layers)
    for stage, pieces in enumerate(stages):
        assert pieces["llm"] == chunks[stage]["llm"] + chunks[stage + 8]["llm"]


@pytest.mark.parametrize(("stage", "part"), [("1", ("vit", "adapter")), ("3", ("adapter", "llm"))])
def test_what_trains_follows_the_stage(stage: str, part: tuple[str, ...]) -> None:
    config = run(f"stage={stage}")
    first = pp_stage_shards(config, layers_per_chunk(config))[0]
    assert trained(config, first) == sum(first[name].total for name in part)


def test_a_decoder_layer_by_hand() -> None:
    """72B, tp 8 with sequence parallelism, 8192 tokens, bf16, a GPU's kernels."""
    tokens, rows, bf16 = 8192, 1024, 2
    norms = 2 * rows * 8192  # their inputs
    into_linear = 2 * rows * 8192
    qkv = tokens * (8 + 1 + 1) * 128
    turned = tokens * (8 + 1) * 128
    tables = 4 * tokens * 128
    out = tokens * 8 * 128
    logsumexp = tokens * 8 * 4
    mlp = tokens * (2 * 3696 + 3696)  # gate and up; their product
    by_hand = bf16 * (norms + into_linear + qkv + turned + tables + out + mlp) + logsumexp
    config = run()
    assert Activations(config, expected_load(config), GPU).decoder_layer() == by_hand


@pytest.mark.parametrize("kernels", [CPU, GPU])
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_more_recomputation_keeps_less(stage: str, kernels) -> None:
    def total(*words: str) -> list[int]:
        return kept(
            run(f"stage={stage}", "parallel.layout=[7,10,10,11,11,11,11,9]", *words), kernels
        )

    nothing = total()
    core = total("parallel.recompute.llm=selective")
    mlp = total("parallel.recompute.llm=selective", "parallel.recompute.modules=[mlp]")
    both = total("parallel.recompute.llm=selective", "parallel.recompute.modules=[core_attn,mlp]")
    full = total("parallel.recompute.llm=full")
    for chunk in range(8):
        assert nothing[chunk] > core[chunk] > both[chunk] > full[chunk]
        assert nothing[chunk] > mlp[chunk] > both[chunk]


def test_a_frozen_vit_keeps_nothing() -> None:
    config = run("stage=3", "stage.adapter.train=false")
    assert Activations(config, expected_load(config), GPU).vision() == 0
    assert Activations(run("stage=3"), expected_load(config), GPU).vision() > 0


def test_the_vit_keeps_in_proportion_to_the_expected_vision() -> None:
    vision = [
        Activations(config, expected_load(config), GPU).vision()
        for config in (run(f"data.vision_share={share}") for share in (0.0, 0.25, 0.5))
    ]
    assert vision[0] == 0
    assert vision[2] == 2 * vision[1]


@settings(deadline=None)
@given(pp=st.integers(1, 12), extra=st.integers(0, 30), size=st.integers(1, 9))
def test_one_forward_one_backward_keeps_as_many_microbatches_as_stages_follow(
    pp: int, extra: int, size: int
) -> None:
    num_microbatches = 1 + extra
    for stage in range(pp):
        most = most_saved([size], stage, pp=pp, vpp=1, num_microbatches=num_microbatches)
        assert most == size * min(pp - stage, num_microbatches)


@settings(deadline=None)
@given(
    pp=st.integers(2, 6),
    vpp=st.integers(2, 4),
    groups=st.integers(1, 7),
    sizes=st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_the_first_groups_of_microbatches_show_the_most_that_interleaving_keeps(
    pp: int, vpp: int, groups: int, sizes: list[int]
) -> None:
    num_microbatches = pp * groups
    chunks = sizes[:vpp]
    for stage in range(pp):
        most = most_saved(chunks, stage, pp=pp, vpp=vpp, num_microbatches=num_microbatches)
        passes = pp_stage_passes(stage, pp=pp, vpp=vpp, num_microbatches=num_microbatches)
        changes = [chunks[one.chunk] * (-1 if one.is_backward else 1) for one in passes]
        assert most == max(accumulate(changes, initial=0))


def test_optimizer_state_is_sharded_and_gradients_are_not() -> None:
    config = run("stage=2")
    layers = layers_per_chunk(config)
    activations = Activations(config, expected_load(config), GPU)
    pieces = pp_stage_shards(config, layers)
    one, sixteen = (
        pp_stage_memory(activations, layers, pieces, dp=dp, num_microbatches=32) for dp in (1, 16)
    )
    for alone, shared, held in zip(one, sixteen, pieces, strict=True):
        number = trained(config, held)
        assert alone.weights == shared.weights == 2 * number
        assert alone.gradients == shared.gradients == 4 * number
        assert alone.optimizer == 12 * number
        assert shared.optimizer == pytest.approx(12 * number / 16, abs=12)


def test_a_frozen_stage_has_no_gradients() -> None:
    config = run("stage=1")
    layers = layers_per_chunk(config)
    memory = pp_stage_memory(
        Activations(config, expected_load(config), GPU),
        layers,
        pp_stage_shards(config, layers),
        dp=16,
        num_microbatches=32,
    )
    assert memory[0].gradients > 0
    assert [stage.gradients + stage.optimizer for stage in memory[1:]] == [0] * 7


BYTES_PER_PARAMETER = {
    "megatron bf16": (2, 4, 12),
    "megatron fp32": (4, 4, 8),
    "deepspeed bf16": (2, 4, 16),
    "deepspeed fp32": (4, 4, 16),
}


@pytest.mark.parametrize("how", BYTES_PER_PARAMETER)
def test_bytes_per_parameter(how: str) -> None:
    """Weights, gradients, optimizer: as counted among the live tensors of one process."""
    zero, precision = how.split()
    config = run(f"train.precision={precision}", f"optimizer.zero={zero}")
    layers = layers_per_chunk(config)
    pieces = pp_stage_shards(config, layers)
    activations = Activations(config, expected_load(config), GPU)
    stage = pp_stage_memory(activations, layers, pieces, dp=1, num_microbatches=32)[1]
    number = trained(config, pieces[1])
    found = (stage.weights, stage.gradients, stage.optimizer)
    assert found == tuple(size * number for size in BYTES_PER_PARAMETER[how])


def test_interleaved_chunks_keep_what_they_sent() -> None:
    config = run("parallel.vpp=2", "parallel.pp=4", "parallel.tp=8")
    layers = layers_per_chunk(config)
    activations = Activations(config, expected_load(config), GPU)
    memory = pp_stage_memory(
        activations, layers, pp_stage_shards(config, layers), dp=1, num_microbatches=32
    )
    kept = [chunk.total for chunk in activations.of_chunks(layers)]
    without = most_saved(kept[1::4], 1, pp=4, vpp=2, num_microbatches=32)
    sent = 8192 // 8 * config.model.language.hidden_size * 2
    in_flight = (memory[1].activations - without) / sent
    assert in_flight == most_saved([1, 1], 1, pp=4, vpp=2, num_microbatches=32)


def test_a_tied_head_on_one_stage_is_no_copy() -> None:
    config = load_config(["model=qwen2_vl_2b"])
    [only] = chunk_shards(config, layers_per_chunk(config))
    untied = replace(
        config,
        model=replace(
            config.model, language=replace(config.model.language, tie_word_embeddings=False)
        ),
    )
    [both] = chunk_shards(untied, layers_per_chunk(untied))
    assert both["llm"].total - only["llm"].total == 1536 * 151936

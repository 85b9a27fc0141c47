"""Every rule of validate.py, by the message it gives."""

import re
from copy import deepcopy
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.configs.compose import load_config
from triptych.configs.overrides import schema_keys
from triptych.configs.problems import Problem, either, refusal
from triptych.configs.rules.bounds import AT_LEAST, AT_MOST
from triptych.configs.validate import validate
from triptych.errors import ConfigError

SEVEN = ["model=qwen2_vl_7b", "init.allow_random=true"]
BATCHED = load_config(SEVEN)


def refused(argv: list[str], message: str, world_size: int = 1) -> str:
    """Assert that the message is given, whatever else is; return the whole text."""
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        validate(load_config(argv), world_size)
    return str(caught.value)


def test_bounds() -> None:
    """All keys in one go: a composition of the configuration takes a tenth of a second."""
    least = {key: least for least, keys in AT_LEAST.items() for key in keys}
    text = refused([f"{key}={bound - 1}" for key, bound in least.items()], "must be at least")
    for key, bound in least.items():
        assert re.search(rf"\b{key}=\S+ must be at least {bound}\b.*-> try {key}={bound}\b", text)


@pytest.mark.parametrize("value", ["{}", "99999999999999999999"])
def test_upper_bounds(value: str) -> None:
    most = {key: most for most, keys in AT_MOST.items() for key in keys}
    argv = [f"{key}={value.format(bound + 1)}" for key, bound in most.items()]
    text = refused(argv, "must be at most")
    for key, bound in most.items():
        assert re.search(rf"\b{key}=\S+ must be at most {bound}\b.*-> try {key}={bound}\b", text)


def test_every_count_has_an_upper_bound() -> None:
    """Token ids are below the vocabulary, the seed below 2**32; booleans are no counts."""
    config = load_config(["cluster=h100", "cluster.gpus=8", "train.num_steps=1"])
    counts = {key for key in schema_keys() if type(attrgetter(key)(config)) is int}
    bounded = {key for keys in AT_MOST.values() for key in keys}
    assert counts - bounded == {"seed", *(key for key in counts if "model.tokens." in key)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.beta1=1.0", "optimizer.beta1=1.0 must be at least 0 and below 1  -> try optimizer.beta1=0.9"),
        ("optimizer.beta2=-0.1", "optimizer.beta2=-0.1 must be at least 0 and below 1  -> try optimizer.beta2=0.95"),
        ("train.spikes.window=1", "train.spikes.window=1 must be at least 2  -> try train.spikes.window=2"),
        ("train.spikes.sigmas=0", "train.spikes.sigmas=0.0 must be above 0  -> try train.spikes.sigmas=6.0"),
        ("optimizer.eps=0", "optimizer.eps=0.0 must be above 0  -> try optimizer.eps=1e-8"),
        ("cluster.peak_tflops=0", "cluster.peak_tflops=0.0 must be above 0  -> try cluster.peak_tflops=989"),
        ("cluster.efficiency.vit=-1", "cluster.efficiency.vit=-1.0 must be above 0  -> try cluster.efficiency.vit=1.0"),
        ("log.wandb_mode=off", "log.wandb_mode=off must be online, offline or disabled  -> try log.wandb_mode=offline"),
        ("parallel.recompute.vit=selective", "parallel.recompute.vit=selective must be none or full  -> try parallel.recompute.vit=full"),
        ("parallel.recompute.modules=[layernorm]", "parallel.recompute.modules=[layernorm] must name core_attn or mlp, or both  -> try parallel.recompute.modules=[core_attn]"),
        ("parallel.recompute.modules=[attn,mlp]", "parallel.recompute.modules=[attn,mlp] must name core_attn or mlp, or both  -> try parallel.recompute.modules=[mlp]"),
        ("parallel.recompute.modules=[]", "must name core_attn or mlp, or both  -> try parallel.recompute.modules=[core_attn]"),
        ("log.wandb_project=../../x", "log.wandb_project=../../x must be a name without any of /\\#?%:  -> try log.wandb_project=triptych"),
        ("log.wandb_project=''", "log.wandb_project= must be a name without any of /\\#?%:  -> try log.wandb_project=triptych"),
        ("log.wandb_name=''", "log.wandb_name has 0 characters; W&B takes 1 to 128  -> try log.wandb_name=null"),
        (f"log.wandb_group={'g' * 129}", "log.wandb_group has 129 characters; W&B takes 1 to 128  -> try"),
        (f"log.wandb_tags=[fine,{'t' * 65}]", "log.wandb_tags has one of 65 characters; W&B takes 1 to 64  -> try"),
        ("train.profile=20", "train.profile=20 must be the first and the last step  -> try train.profile=20..22"),
        ("train.profile=0..1", "train.profile=0..1 must be the first and the last step"),
        ("train.profile=9..8", "train.profile=9..8 must be the first and the last step"),
        ("train.profile=5..25", "train.profile=5..25 must be 20 steps at most  -> try train.profile=5..7"),
        ("cluster.measured=[1,2]", "cluster.measured=[1,2] may name efficiency, link_efficiency, latency_us or reserved_gib  -> try cluster.measured=[]"),
        ("cluster.measured=[efficiency,x]", "-> try cluster.measured=[efficiency]"),
        ("init.checkpoint=Qwen/Qwen2-VL-7B", "convert.py import wrote; from the hub: hf download Qwen/Qwen2-VL-7B --local-dir Qwen2-VL-7B"),
        ("resume=''", "resume is empty  -> try resume=auto, resume=never or a path"),
        ("init.language=Qwen/Qwen2-7B", "the folder of a Qwen2 or Qwen2.5 text model; from the hub: hf download Qwen/Qwen2-7B --local-dir Qwen2-7B"),
        ("init.vision=nowhere", "init.vision=nowhere does not exist  -> try the folder of a CLIP ViT, a Qwen2-VL or a Qwen2.5-VL model"),
        ("init.vision=''", "init.vision is empty  -> try init.vision=PATH, or init.vision=null for none"),
        ("init.checkpoint=''", "init.checkpoint is empty  -> try init.checkpoint=PATH, or init.checkpoint=null for none"),
        ("resume=runs/nowhere", "resume=runs/nowhere does not exist  -> try resume=auto, resume=never or a path"),
    ],
)  # fmt: skip
def test_single_values(override: str, message: str) -> None:
    refused([override], message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.vit.lr=0", "stage.vit.lr=0.0 must be above 0 where stage.vit.train=true  -> try stage.vit.lr=1e-5 or stage.vit.train=false"),
        ("stage.llm.min_lr=1.0", "stage.llm.min_lr=1.0 must be from 0 to stage.llm.lr=0.001  -> try stage.llm.min_lr=0.0001"),
        ("stage.adapter.warmup=2", "stage.adapter.warmup=2.0 is a share of the token budget, from 0 to 1  -> try stage.adapter.warmup=0.01"),
    ],
)  # fmt: skip
def test_learning_rates(override: str, message: str) -> None:
    refused([override], message)


def test_a_part_that_is_frozen_needs_no_learning_rate() -> None:
    validate(load_config(["stage=1", "stage.llm.lr=0"]), world_size=1)


def test_nothing_trains() -> None:
    frozen = [f"stage.{part}.train=false" for part in ("vit", "adapter", "llm")]
    refused(frozen, "stage.llm.train=false: nothing trains  -> try stage.llm.train=true")


def test_a_real_model_needs_weights(tmp_path: Path) -> None:
    message = (
        "init.checkpoint=null leaves model.name=qwen2_vl_7b without weights"
        "  -> try init.checkpoint=PATH, or init.language=PATH with init.vision=PATH, or init.allow_random"
    )
    refused(["model=qwen2_vl_7b"], message)
    validate(load_config(["model=qwen2_vl_7b", f"init.checkpoint={tmp_path}"]), world_size=1)
    validate(load_config(["model=qwen2_vl_7b", f"resume={tmp_path}"]), world_size=1)
    validate(load_config(SEVEN), world_size=1)


def test_each_tower_of_a_real_model_needs_weights_from_one_place(tmp_path: Path) -> None:
    language, vision = (f"init.{key}={tmp_path}" for key in ("language", "vision"))
    message = (
        "init.vision=null leaves the ViT without weights  -> try init.vision=PATH, or init.allow"
    )
    refused(["model=qwen2_vl_7b", language], message)
    refused(["model=qwen2_vl_7b", vision], "init.language=null leaves the language model without")
    validate(load_config(["model=qwen2_vl_7b", language, vision]), world_size=1)
    validate(load_config([*SEVEN, language]), world_size=1)
    both = f"init.checkpoint={tmp_path} and {vision} both give weights  -> try init.vision=null or"
    refused([*SEVEN, vision, f"init.checkpoint={tmp_path}"], both)


def test_a_checkpoint_to_start_from_exists(tmp_path: Path) -> None:
    argv = ["init.checkpoint=runs/nowhere", f"run.dir={tmp_path}"]
    refused(argv, "init.checkpoint=runs/nowhere does not exist  -> try the folder of a run")
    (tmp_path / "checkpoints").mkdir()  # now the run resumes, and asks for it no more
    validate(load_config(argv), world_size=1)
    refused([*argv, "resume=never"], "init.checkpoint=runs/nowhere does not exist")


def test_optimizer_state_comes_from_somewhere() -> None:
    refused(["init.optimizer_state=true"], "needs init.checkpoint to take it from  -> try init")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.name=mine", "data.mixtures.mine is empty: stage.name=mine has no data  -> try data.mixtures.mine.SOURCE=1.0"),
        ("data.mixtures.stage2.capions=1", "data.mixtures.stage2.capions=1.0 names no source of data.sources  -> try data.mixtures.stage2.captions=1.0"),
        ("data.mixtures.stage2.text=0", "data.mixtures.stage2.text=0.0 must be above 0, and finite  -> try data.mixtures.stage2.text=1.0"),
        ("data.validation.held=1", "data.validation.held=1.0 names no source of data.sources  -> try data.validation.heldout=1.0"),
        ("data.validation.heldout=-1", "data.validation.heldout=-1.0 must be above 0"),
        ("data.mixtures.stage2.text=1e999", "data.mixtures.stage2.text=inf must be above 0, and finite"),
        ("data.sources.text.max_epochs=0", "data.sources.text.max_epochs=0.0 must be above 0, and at most 1,000,000  -> try data.sources.text.max_epochs=null"),
        ("data.order=nowhere.npy", "data.order=nowhere.npy is no file  -> try launch/prepare.py export-order"),
        ("data.sources.text.max_epochs=1e999", "data.sources.text.max_epochs=inf must be above 0, and at most"),
        ("data.root=''", "data.generate=true needs data.root to write to  -> try data.root=runs/sample_data"),
    ],
)  # fmt: skip
def test_data(override: str, message: str) -> None:
    refused([override], message)


def test_an_order_names_every_sample_itself() -> None:
    words = ["data.order=nowhere.npy", "data.weigh_by=tokens", "data.sources.text.max_epochs=2"]
    text = refused(words, "data.weigh_by=tokens says nothing beside data.order=nowhere.npy")
    assert "data.sources.text.max_epochs=2.0 says nothing beside data.order" in text


def test_a_stage_with_an_empty_mixture(tmp_path: Path) -> None:
    config = load_config([])
    config.data.mixtures["stage2"] = {}
    with pytest.raises(ConfigError, match=r"data.mixtures.stage2 is empty"):
        validate(config, world_size=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.evaluation=[]", r"evaluate_every=5 has no data.evaluation to ask  -> try train\."),
        ("data.evaluation=[held]", r"names held, no source of data.sources  -> try .*\[heldout\]"),
        ("data.evaluation=[chat,chat]", r"names a source twice .*-> try data.evaluation=\[chat\]"),
        ("train.evaluation_questions=0", "train.evaluation_questions=0 must be at least 1"),
    ],
)
def test_evaluation_needs_questions(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load_config(["train.evaluate_every=5", words]), world_size=1)


def test_validation_needs_data() -> None:
    config = load_config(["train.validate_every=5"])
    validate(config, world_size=1)
    config.data.validation = {}
    with pytest.raises(
        ConfigError, match=r"validate_every=5 has no data.validation to read  -> try"
    ):
        validate(config, world_size=1)


def test_folders_exist_unless_they_are_generated(tmp_path: Path) -> None:
    argv = ["data.generate=false", f"data.root={tmp_path}"]
    text = refused(argv, f"data.tokenizer={tmp_path}/tokenizer is no folder  ")
    assert f"data.sources.strings.path={tmp_path}/strings is no folder" in text
    assert "-> try data.tokenizer=FOLDER, one that holds a Hugging Face tokenizer" in text
    assert "-> try data.sources.strings.path=FOLDER, one that launch/prepare.py wrote" in text
    assert "data.sources.chat" not in text  # stage 2 does not read it
    assert "data.sources.heldout" not in text  # nothing is validated
    for name in ("tokenizer", "strings", "captions", "text", "every_kind"):
        (tmp_path / name).mkdir()
    validate(load_config(argv), world_size=1)
    refused([*argv, "train.validate_every=5"], f"data.sources.heldout.path={tmp_path}/heldout is")
    hub = refused([*argv, "data.tokenizer=Qwen/Qwen2-VL-7B"], "data.tokenizer=Qwen/Qwen2-VL-7B is")
    assert "; from the hub: hf download Qwen/Qwen2-VL-7B --local-dir Qwen2-VL-7B" in hub


@pytest.mark.parametrize(
    ("argv", "world_size", "message"),
    [
        (["parallel=tp2_pp2"], 6, "6 ranks must be a multiple of parallel.tp*pp = 2*2=4  -> try 4 or 8 ranks"),
        (["parallel=tp2_pp2"], 1, "1 ranks must be a multiple of parallel.tp*pp = 2*2=4  -> try 4 ranks"),
        ([*SEVEN, "parallel.tp=3"], 3, "parallel.tp=3 must divide model.vision.num_heads=16 and intermediate_size=5120"),
        ([*SEVEN, "parallel.tp=8"], 8, "parallel.tp=8 must divide model.language.num_heads=28 and num_kv_heads=4  -> try parallel.tp=2 or parallel.tp=4"),
        (["parallel.tp=2", "model.language.vocab_size=511"], 2, "parallel.tp=2 must divide model.language.vocab_size=511  -> try parallel.tp=1"),
        (["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel=true has no ranks to shard over at parallel.tp=1  -> try parallel.sequence_parallel=false"),
        (["parallel.pp=8"], 8, "parallel.pp=8 must be at most model.language.num_layers=4  -> try parallel.pp=4"),
        (["parallel.pp=2", "parallel.layout=[4]"], 2, "parallel.layout=[4] must have parallel.pp=2 entries  -> try parallel.layout=[2,2] or parallel.layout=auto"),
        (["parallel.pp=2", "parallel.layout=[0,4]"], 2, "parallel.layout=[0,4] must leave every pipeline stage a decoder layer  -> try parallel.layout=[2,2]"),
        (["parallel.pp=3", "parallel.layout=[2,2,2]"], 3, "parallel.layout=[2,2,2] adds up to 6, not to model.language.num_layers=4  -> try parallel.layout=[1,1,2]"),
        (["parallel.pp=2", "parallel.vpp=2", "parallel.layout=[2,2]"], 2, "parallel.layout=[2,2] must have parallel.pp*vpp=4 entries  -> try parallel.layout=[1,1,1,1] or parallel.layout=auto"),
        (["parallel.pp=2", "parallel.vpp=3"], 2, "parallel.pp*vpp=6 must be at most model.language.num_layers=4  -> try smaller parallel.pp or parallel.vpp"),
        (["parallel.pp=2", "parallel.layout=even"], 2, "parallel.layout=even must be auto or a list of layer counts  -> try parallel.layout=[2,2]"),
        (["parallel.pp=2", "parallel.layout=[1.5,2.5]"], 2, "must be auto or a list of layer counts"),
        (["train.global_batch_size=100", "train.micro_batch_size=4"], 8, "train.global_batch_size=100 must be a multiple of micro_batch_size*dp = 4*8=32  -> try train.global_batch_size=96 or train.global_batch_size=128"),
        (["parallel.vpp=2"], 1, "parallel.vpp=2 has no pipeline to interleave at parallel.pp=1  -> try parallel.vpp=1"),
        (["parallel=pp2", "parallel.vpp=2", "train.global_batch_size=3"], 2, "train.global_batch_size=3 gives 3 microbatches per step, but with parallel.vpp=2 they go through the chunks in groups of parallel.pp=2  -> try train.global_batch_size=2 or train.global_batch_size=4"),
        (["parallel=pp2", "parallel.overlap.p2p=true"], 2, "parallel.overlap.p2p=true needs chunks to compute while messages travel, but parallel.vpp=1  -> try parallel.overlap.p2p=false or parallel.vpp=2"),
        (["parallel=tp2", "parallel.sequence_parallel=false", "parallel.overlap.tp_comm=true"], 2, "parallel.overlap.tp_comm=true splits what sequence parallelism gathers and scatters, but parallel.sequence_parallel=false  -> try parallel.sequence_parallel=true or parallel.overlap.tp_comm=false"),
        (["parallel=tp2", "parallel.overlap.tp_comm=true", "cluster=h100", "cluster.gpus_per_node=1"], 2, "parallel.overlap.tp_comm=true goes through NVLink, but parallel.tp=2 is more than a node has: cluster.gpus_per_node=1  -> try parallel.overlap.tp_comm=false"),
        (["parallel.overlap.param_gather=true"], 1, "parallel.overlap.param_gather=true needs parallel.overlap.grad_reduce=true  -> try parallel.overlap.grad_reduce=true"),
        (["parallel.overlap.grad_reduce=true", "optimizer.zero=deepspeed"], 1, "parallel.overlap.grad_reduce needs optimizer.zero=megatron; DeepSpeed's optimizer is used after the backward pass  -> try optimizer.zero=megatron or parallel.overlap.grad_reduce=false"),
        (["train.global_batch_size=4"], 8, "micro_batch_size*dp = 1*8=8  -> try train.global_batch_size=8"),
    ],
)  # fmt: skip
def test_parallel(argv: list[str], world_size: int, message: str) -> None:
    refused(argv, message, world_size)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.hidden_size=120", "model.vision.hidden_size=120 must be a multiple of 4*num_heads = 16, as 2D-RoPE turns pairs along two axes  -> try model.vision.hidden_size=128"),
        ("model.vision.window_size=100", "model.vision.window_size=100 must be a multiple of patch_size*spatial_merge_size = 28, as windows hold whole tokens  -> try model.vision.window_size=112"),
        ("model.vision.full_attention_layers=[1]", "model.vision.full_attention_layers=[1] sets apart layers without windows, but model.vision.window_size=0 has none  -> try model.vision.window_size=112 or model.vision.full_attention_layers=[]"),
        ("model.language.hidden_size=193", "model.language.hidden_size=193 must be num_heads*head_dim = 4*48=192  -> try model.language.hidden_size=192"),
        ("model.language.head_dim=24", "model.language.hidden_size=192 must be num_heads*head_dim = 4*24=96 "),
        ("model.language.num_kv_heads=3", "model.language.num_kv_heads=3 must divide num_heads=4  -> try model.language.num_kv_heads=1"),
        ("model.language.mrope_section=[8,8]", "model.language.mrope_section=[8,8] must be three counts that add up to head_dim/2 = 48/2  -> try model.language.mrope_section=[6,9,9]"),
        ("model.language.mrope_section=[16,24,24]", "mrope_section=[16,24,24] must be three counts"),
        ("model.tokens.video_pad=512", "model.tokens.video_pad=512 must be below model.language.vocab_size=512  -> try the id that the tokenizer gives it, model.tokens.video_pad=ID"),
        ("model.tokens.im_end=1", "model.tokens.im_start=1 and model.tokens.im_end=1 must differ  -> try the ids that the tokenizer gives"),
    ],
)  # fmt: skip
def test_model(override: str, message: str) -> None:
    refused([override], message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_pixels=783", "data.max_pixels=783 must be at least one token: 784  -> try data.max_pixels=784"),
        ("data.min_pixels=30000", "data.min_pixels=30000 must be at most data.max_pixels=28224  -> try data.min_pixels=784"),
        ("train.seq_len=32", "train.seq_len=32 must hold the 36 + 2 tokens of an image of data.max_pixels=28224  -> try data.max_pixels=23520 or train.seq_len=38"),
        ("train.seq_len=2", "train.seq_len=2 must hold the 36 + 2 tokens of an image of data.max_pixels=28224 "),
        ("data.max_patches=100", "data.max_patches=100 must hold the 144 patches of an image of data.max_pixels=28224  -> try data.max_patches=144"),
    ],
)  # fmt: skip
def test_images(override: str, message: str) -> None:
    refused([override], message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.video.fps=0", "data.video.fps=0.0 must be above 0  -> try data.video.fps=2.0"),
        ("data.video.max_pixels=783", "data.video.max_pixels=783 must be at least one token: 784 "),
        ("data.video.min_pixels=30000", "data.video.min_pixels=30000 must be at most data.video.max_pixels=28224  -> try data.video.min_pixels=784"),
        ("data.video.min_frames=17", "data.video.max_frames=16 must be at least data.video.min_frames and a patch: 17  -> try data.video.max_frames=17"),
        ("data.video.max_tokens=7", "data.video.max_tokens=7 must be at least the tokens of data.video.max_frames=16 frames, 2 in each: 8  -> try data.video.max_tokens=8"),
    ],
)  # fmt: skip
def test_videos(override: str, message: str) -> None:
    refused([override], message)


def test_all_problems_are_reported_at_once() -> None:
    text = refused(
        [
            "model=qwen2_vl_7b",
            "parallel.tp=3",
            "train.global_batch_size=100",
            "train.micro_batch_size=4",
            "train.seq_len=64",
            "stage.llm.lr=0",
            "log.wandb_mode=off",
            "stage.name=mine",
        ],
        "8 problems in this run\n",
        world_size=24,
    )
    lines = text.splitlines()
    assert len(lines) == 9
    assert all("  -> try " in line for line in lines[1:])
    short = [line.index("  -> try ") for line in lines[1:]]
    assert len(set(short)) == 1  # the remedies stand in a column


@given(batch=st.integers(1, 4096), micro=st.integers(1, 9), dp=st.integers(1, 64))
def test_a_suggested_batch_is_accepted(batch: int, micro: int, dp: int) -> None:
    config = deepcopy(BATCHED)
    config.train.global_batch_size, config.train.micro_batch_size = batch, micro
    try:
        validate(config, world_size=dp)
    except ConfigError as error:
        suggested = re.findall(r"try train.global_batch_size=(\d+)", str(error))
        config.train.global_batch_size = int(suggested[0])
        validate(config, world_size=dp)


def test_a_long_rule_does_not_push_the_other_remedies_away() -> None:
    text = str(refusal([Problem("a=1 is bad", "a=2"), Problem("b" * 150, "b=2")]))
    assert text == f"2 problems in this run\n  a=1 is bad  -> try a=2\n  {'b' * 150}  -> try b=2"


def test_either() -> None:
    assert either(["a"]) == "a"
    assert either([1, 2]) == "1 or 2"
    assert either("abc") == "a, b or c"

"""Weights and sizes go to Hugging Face folders and back without a bit lost, whatever tp."""

import json
import os
import re
import stat
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.utils import is_torchvision_available

from triptych.checkpoints.hf.folder import HFReader
from triptych.checkpoints.hf.folder_writer import HFWriter
from triptych.checkpoints.hf.model_config import hf_config, model_config_from_hf
from triptych.checkpoints.hf.name_table import hub_name, name_table
from triptych.checkpoints.hf.origin import Origin
from triptych.checkpoints.hf.processor import load_processor
from triptych.checkpoints.hf.tensor_files import INDEX, SINGLE
from triptych.configs.model_schema import (
    LanguageConfig,
    ModelConfig,
    TokensConfig,
    VisionConfig,
    VisionMLP,
    VisionNorm,
)
from triptych.data.chat import encode_prompt
from triptych.data.media.normalize import normalize_patches
from triptych.data.tokenizer import load_tokenizer, train_tokenizer
from triptych.data.types import PixelLimits
from triptych.errors import CheckpointError, ConfigError, DataError
from triptych.models.sharding import shard, unshard
from triptych.tests.helpers.image_patches import image_patches

LIMITS = PixelLimits(min_pixels=784, max_pixels=28224)
ORIGIN = Origin(limits=LIMITS, stage="stage3")
TOKENS = TokensConfig(
    endoftext=0, im_start=1, im_end=2, vision_start=9, vision_end=10, image_pad=12, video_pad=13
)


def tiny(num_heads: int = 4, num_kv_heads: int = 2, *, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        vision=VisionConfig(depth=2, hidden_size=32, num_heads=4, intermediate_size=64),
        language=LanguageConfig(
            hidden_size=8 * num_heads,
            num_layers=2,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=8,
            intermediate_size=48,
            vocab_size=280,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-6,
            mrope_section=[2, 1, 1],
            max_position_embeddings=512,
        ),
        tokens=TOKENS,
    )


def transformers_model(model: ModelConfig, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """With weights that are all different, biases and norms too."""
    made = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**hf_config(model)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["read the digits"], folder, 280)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder that transformers saved, untied, two q heads per kv head."""
    folder = tmp_path_factory.mktemp("hf") / "saved"
    transformers_model(tiny()).save_pretrained(folder)
    return folder


def export(
    reader: HFReader, model: ModelConfig, to: Path, tokenizer: Path, dtype=torch.float32, **options
) -> Path:
    writer = HFWriter(to, model, dtype, **options)
    for name in reversed(writer.shapes):  # any order
        writer.add(name, reader.read(name))
    writer.finish(tokenizer, ORIGIN)
    return to


# --- weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (6, 2), (5, 1), (7, 1)])
@pytest.mark.parametrize("max_shard_bytes", [30_000, 10**9])
def test_import_and_export_lose_no_bit(
    tmp_path, tokenizer, num_heads, num_kv_heads, tied, max_shard_bytes
):
    model = tiny(num_heads, num_kv_heads, tied=tied)
    original = transformers_model(model)
    original.save_pretrained(tmp_path / "in", max_shard_size=max_shard_bytes)
    assert (tmp_path / "in" / INDEX).exists() == (max_shard_bytes == 30_000)

    reader = HFReader(tmp_path / "in", model_config_from_hf(tmp_path / "in"))
    out = export(reader, model, tmp_path / "out", tokenizer, max_shard_bytes=max_shard_bytes)
    assert (out / INDEX).exists() == (max_shard_bytes == 30_000)
    again, report = Qwen2VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    want, got = original.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_every_parameter_of_ours_and_theirs_is_in_the_table():
    """Numbers of parameters: Qwen2-VL's own (their tensors) and the sum over ours are the same."""
    sizes = {  # shared by 2B, 7B and 72B: FACTS of the released models
        "2b": ((1536, 28, 12, 2, 8960, 151936, True), 2_208_985_600),
        "7b": ((3584, 28, 28, 4, 18944, 152064, False), 8_291_375_616),
        "72b": ((8192, 80, 64, 8, 29568, 152064, False), 73_405_560_320),
    }
    for name, (language, num_parameters) in sizes.items():
        keys = "hidden_size num_layers num_heads num_kv_heads intermediate_size vocab_size"
        language_config = LanguageConfig(
            **dict(zip(keys.split(), language, strict=False)), head_dim=128
        )
        language_config.tie_word_embeddings = language[-1]
        entries = name_table(ModelConfig(name=name, language=language_config)).values()
        exported = [entry for entry in entries if entry.exported]
        assert sum(prod(entry.shape) for entry in exported) == num_parameters
        theirs = [shape for entry in exported for shape in entry.theirs.values()]
        assert sum(prod(shape) for shape in theirs) == num_parameters


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_pieces_read_from_the_file_are_those_cut_from_the_whole(tmp_path, tp):
    model = tiny(num_heads=8, num_kv_heads=4)
    transformers_model(model).save_pretrained(tmp_path)
    reader = HFReader(tmp_path, model)
    for name, entry in name_table(model).items():
        full = reader.read(name)
        pieces = [reader.read(name, tp_rank, tp) for tp_rank in range(tp)]
        for tp_rank, piece in enumerate(pieces):
            assert torch.equal(piece, shard(full, entry.sharding, tp_rank, tp)), name
        assert torch.equal(unshard(pieces, entry.sharding), full), name
        assert full.shape == entry.shape


def test_the_tied_embedding_fills_the_copy_of_the_last_stage_and_is_exported_once(
    tmp_path, tokenizer
):
    model = tiny(tied=True)
    transformers_model(model).save_pretrained(tmp_path / "in")
    reader = HFReader(tmp_path / "in", model)
    head = reader.read("language.output_layer.weight", 1, 2)
    assert torch.equal(head, reader.read("language.embedding.word_embeddings.weight")[140:])
    export(reader, model, tmp_path / "out", tokenizer)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / SINGLE)


# --- what the rows mean, by the projections that transformers computes


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 2), (7, 1)])
def test_qkv_rows_hold_the_heads_of_each_group_then_its_k_and_v(tmp_path, num_heads, num_kv_heads):
    model = tiny(num_heads, num_kv_heads)
    theirs = transformers_model(model)
    theirs.save_pretrained(tmp_path)
    reader = HFReader(tmp_path, model)
    token = torch.randn(model.language.hidden_size)
    attention = theirs.model.language_model.layers[1].self_attn
    q, k, v = (getattr(attention, f"{x}_proj")(token).view(-1, 8) for x in "qkv")

    name = "language.decoder.layers.1.self_attention.linear_qkv"
    ours = reader.read(f"{name}.weight") @ token + reader.read(f"{name}.bias")
    heads_per_group = num_heads // num_kv_heads
    ours = ours.view(num_kv_heads, heads_per_group + 2, 8)
    for head in range(num_heads):  # transformers repeats each kv head for its neighbouring q heads
        close(ours[head // heads_per_group, head % heads_per_group], q[head])
    close(ours[:, -2], k)
    close(ours[:, -1], v)


def test_vision_qkv_rows_hold_q_k_and_v_of_each_head(saved):
    reader, theirs = HFReader(saved, tiny()), transformers_model(tiny())
    patch = torch.randn(32)
    qkv = theirs.model.visual.blocks[1].attn.qkv(patch).view(3, 4, 8)
    name = "vision.decoder.layers.1.self_attention.linear_qkv"
    ours = reader.read(f"{name}.weight") @ patch + reader.read(f"{name}.bias")
    close(ours.view(4, 3, 8), qkv.transpose(0, 1))


def test_gate_comes_before_up(saved):
    reader, theirs = HFReader(saved, tiny()), transformers_model(tiny())
    token = torch.randn(32)
    mlp = theirs.model.language_model.layers[0].mlp
    gate, up = (reader.read("language.decoder.layers.0.mlp.linear_fc1.weight") @ token).chunk(2)
    down = reader.read("language.decoder.layers.0.mlp.linear_fc2.weight")
    close(down @ (torch.nn.functional.silu(gate) * up), mlp(token))


def test_patch_embedding_is_the_convolution(saved):
    reader, theirs = HFReader(saved, tiny()), transformers_model(tiny())
    patches = torch.randn(5, 1176) / 1176**0.5  # outputs near 1, as the tolerance expects
    close(
        patches @ reader.read("vision.patch_embed.weight").T,
        theirs.model.visual.patch_embed(patches),
    )


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


# --- folders that hold something else


def test_both_ways_of_prefixing_names_are_read(tmp_path, saved):
    def prefixed(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1)

    tensors = load_file(saved / SINGLE)
    renamed = {prefixed(name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    assert [hub_name(name) for name in renamed] == list(tensors)
    save_file(renamed, tmp_path / SINGLE)
    one, other = HFReader(saved, tiny()), HFReader(tmp_path, tiny())
    assert all(torch.equal(one.read(name), other.read(name)) for name in name_table(tiny()))


def test_another_model_is_refused_with_every_difference(tmp_path, saved):
    tensors = load_file(saved / SINGLE)
    del tensors["visual.blocks.1.norm1.bias"]
    for i in range(2):
        del tensors[f"model.layers.{i}.self_attn.k_proj.bias"]
    tensors["visual.extra.weight"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as error:
        HFReader(tmp_path, tiny())
    assert str(error.value).splitlines() == [
        f"{tmp_path} does not hold the tensors of model tiny:",
        "  missing: model.layers.*.self_attn.k_proj.bias (2 of them)",
        "  missing: visual.blocks.1.norm1.bias",
        "  unexpected: visual.extra.weight",
        "  mis-shaped: model.norm.weight is (3,), the model has (32,)",
    ]


def test_a_tied_weight_saved_twice_is_accepted_only_if_equal(tmp_path):
    model = tiny(tied=True)
    transformers_model(model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / SINGLE)
    HFReader(tmp_path, model)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"unexpected: lm_head\.weight"):
        HFReader(tmp_path, model)


def test_missing_and_damaged_files_are_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .*found nothing"):
        HFReader(tmp_path, tiny())
    content = (saved / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        HFReader(tmp_path, tiny())
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors cannot be read"):
        HFReader(tmp_path, tiny())


# --- the writer


def test_an_export_appears_only_when_it_is_complete(tmp_path, saved, tokenizer):
    reader = HFReader(saved, tiny())
    writer = HFWriter(tmp_path / "out", tiny(), torch.float32)
    with pytest.raises(CheckpointError, match=r"missing: .*\(2 of them\)"):
        writer.finish(tokenizer, ORIGIN)
    assert not (tmp_path / "out").exists()
    name = "merger.norm.weight"
    with pytest.raises(CheckpointError, match=re.escape("is (3,), the model has (32,)")):
        HFWriter(tmp_path / "out", tiny(), torch.float32).add(name, torch.zeros(3))
    writer = HFWriter(tmp_path / "out", tiny(), torch.float32)
    writer.add(name, reader.read(name))
    with pytest.raises(CheckpointError, match="or came before"):
        writer.add(name, reader.read(name))
    export(reader, tiny(), tmp_path / "out", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="is there already"):
        HFWriter(tmp_path / "out", tiny(), torch.float32)
    with pytest.raises(CheckpointError, match=r"no tokenizer_config\.json"):
        export(reader, tiny(), tmp_path / "other", tmp_path)


def test_a_tensor_may_change_after_it_was_added(tmp_path, saved, tokenizer):
    reader, writer = HFReader(saved, tiny()), HFWriter(tmp_path / "out", tiny(), torch.float32)
    for name in writer.shapes:
        tensor = reader.read(name)
        writer.add(name, tensor)
        tensor.zero_()
    writer.finish(tokenizer, ORIGIN)
    want, got = load_file(saved / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_bf16_stays_bf16(tmp_path, tokenizer):
    transformers_model(tiny()).bfloat16().save_pretrained(tmp_path / "in")
    reader = HFReader(tmp_path / "in", tiny())
    out = export(reader, tiny(), tmp_path / "out", tokenizer, torch.bfloat16)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(out)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_transformers_loads_tokenizer_processor_and_sizes(tmp_path, saved, tokenizer):
    out = export(HFReader(saved, tiny()), tiny(), tmp_path / "out", tokenizer)
    text = "<|im_start|>user\nread the digits<|im_end|>"
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded(text).input_ids == AutoTokenizer.from_pretrained(tokenizer)(text).input_ids
    assert loaded(text).input_ids[0] == TOKENS.im_start
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    assert (processor.patch_size, processor.merge_size) == (14, 2)
    assert processor.size["shortest_edge"] == LIMITS.min_pixels
    assert processor.size["longest_edge"] == LIMITS.max_pixels
    assert replace(model_config_from_hf(out), name="tiny") == tiny()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_an_export_is_readable_by_whom_the_umask_lets_read(tmp_path, saved, tokenizer, umask):
    before = os.umask(umask)
    try:
        out = export(HFReader(saved, tiny()), tiny(), tmp_path / "out", tokenizer)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert SINGLE in modes
    assert set(modes.values()) == {0o666 & ~umask}, modes


# --- the processor


def test_the_processor_of_an_export_opens_and_gives_our_pixels_and_tokens(
    tmp_path, saved, tokenizer
):
    """Also where torchvision is missing, as in the environment that ``make install`` makes."""
    out = export(HFReader(saved, tiny()), tiny(), tmp_path / "out", tokenizer)
    processor = load_processor(out)
    picture = Image.radial_gradient("L").resize((150, 90)).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "read the digits"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    patches, grid = image_patches(picture, LIMITS, tiny().vision)
    assert prompt["image_grid_thw"].tolist() == [list(grid)]
    ids = prompt["input_ids"][0].tolist()
    assert ids.count(TOKENS.image_pad) == prod(grid) // 4
    content[0] = {"type": "image", "image": "a.png"}
    ours = encode_prompt([{"role": "user", "content": content}], load_tokenizer(tokenizer))
    pad = [TOKENS.image_pad]
    assert [i for i in ids if i not in pad] == [i for i in ours.input_ids if i not in pad]
    if not is_torchvision_available():
        pixels = normalize_patches(torch.from_numpy(patches))
        assert torch.equal(prompt["pixel_values"], pixels)
        with pytest.raises(DataError, match="videos need torchvision"):
            processor(videos=[picture], text=["<|video_pad|>"])


# --- sizes


@pytest.mark.parametrize("tied", [False, True])
def test_both_forms_of_config_json_give_the_same_sizes(tmp_path, tied):
    model = tiny(tied=tied)
    nested, flat = tmp_path / "nested" / "tiny", tmp_path / "flat" / "tiny"
    Qwen2VLConfig(**hf_config(model)).save_pretrained(nested)
    flat.mkdir(parents=True)
    (flat / "config.json").write_text(json.dumps(hf_config(model)))
    assert "text_config" in json.loads((nested / "config.json").read_text())
    # no tokenizer beside it: the ids of text tokens stay those of the Qwen2 vocabulary
    tokens = TokensConfig(vision_start=9, vision_end=10, image_pad=12, video_pad=13)
    for folder in (nested, flat):
        assert asdict(model_config_from_hf(folder)) == asdict(replace(model, tokens=tokens))


def test_a_hub_config_of_transformers_4_which_leaves_out_defaults(tmp_path):
    """The public 72B config, without what equals the class's defaults."""
    config = {
        "model_type": "qwen2_vl",
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"hidden_size": 8192, "in_chans": 3, "spatial_patch_size": 14},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = model_config_from_hf(tmp_path)
    language = LanguageConfig(
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=29568,
        vocab_size=152064,
    )
    assert model == ModelConfig(name=tmp_path.name, language=language)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; known is 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type='yarn'"),
        ({"rope_scaling": None}, "mrope_section='missing'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config='given'"),
        ({"num_attention_heads": 5}, "hidden_size % num_attention_heads=2"),
        ({"vision_config": {"hidden_size": 99}}, "vision_config.hidden_size=99; known is 32"),
        ({"vision_config": {"in_channels": 4}}, "vision_config.in_channels=4; known is 3"),
    ],
)
def test_features_we_do_not_have_are_named(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny()) | change))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        model_config_from_hf(tmp_path)


def test_all_unsupported_features_are_named_at_once(tmp_path):
    changes = {"hidden_act": "gelu", "attention_dropout": 0.1, "use_sliding_window": True}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tiny()) | changes))
    with pytest.raises(CheckpointError) as error:
        model_config_from_hf(tmp_path)
    assert len(str(error.value).splitlines()) == 1 + len(changes)


def test_other_folders_are_refused(tmp_path, saved, tokenizer):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        model_config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        model_config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(CheckpointError, match="model_type='qwen2_5_vl', known is 'qwen2_vl'"):
        model_config_from_hf(tmp_path)


def test_a_tokenizer_that_contradicts_the_config_is_refused(tmp_path, tokenizer):
    contradiction = hf_config(tiny()) | {"image_token_id": 99}
    (tmp_path / "config.json").write_text(json.dumps(contradiction))
    content = (tokenizer / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content)
    message = re.escape("<|image_pad|> is 12 in the tokenizer, image_token_id=99 in config.json")
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content.replace("<|im_start|>", "<|begin|>"))
    with pytest.raises(ConfigError, match="lacks 1 of the special tokens"):
        model_config_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("part", "sizes", "message"),
    [
        ("language", {"head_dim": 16}, "head_dim = hidden_size / num_heads"),
        ("vision", {"intermediate_size": 80}, "a whole mlp_ratio"),
        ("vision", {"norm": VisionNorm.rmsnorm}, "norm=layernorm, mlp=quick_gelu and no windows"),
        ("vision", {"window_size": 112}, "norm=layernorm, mlp=quick_gelu and no windows"),
        ("vision", {"mlp": VisionMLP.swiglu}, "norm=layernorm, mlp=quick_gelu and no windows"),
    ],
)
def test_sizes_that_transformers_cannot_have_are_refused(tmp_path, part, sizes, message):
    model = tiny()
    setattr(model, part, replace(getattr(model, part), **sizes))
    with pytest.raises(CheckpointError, match=message):
        HFWriter(tmp_path / "out", model, torch.float32)
    assert not list(tmp_path.iterdir())

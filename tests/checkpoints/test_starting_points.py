"""A run starts from a published language model and a published ViT, in any layout.

pytest -s tests/checkpoints/test_starting_points.py      # prints how far it is from CLIP's layers
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from triptych.checkpoints.hf.name_table import name_table
from triptych.checkpoints.hf.starting_points import StartingPart, open_parts, table_of_fates
from triptych.checkpoints.model_file import read_model
from triptych.checkpoints.run_state import WEIGHTS
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.configs.compose import load_config
from triptych.configs.model_schema import ModelConfig, VisionConfig
from triptych.configs.schema import InitConfig, Kernels, ParallelConfig, Precision
from triptych.data.patch_layout import PatchLayout
from triptych.data.tokenizer import train_tokenizer
from triptych.errors import CheckpointError, ConfigError
from triptych.models.init import EMBEDDING, EMBEDDING_STD, HEAD
from triptych.models.kernels import Installed, choose
from triptych.models.parameters import global_parameters
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.models.qwen_vl.vision import VisionTower
from triptych.models.sharding import shard
from triptych.parallel.mesh import Mesh, build_mesh
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.published import (
    clip_vit,
    qwen2,
    qwen2_5_vl,
    save_clip_model,
    save_open_clip,
)
from triptych.tests.helpers.reference import (
    normalized,
    save_reference,
    small_model,
    transformers_model,
)
from triptych.tests.helpers.runs import SMALL, Runs, losses
from triptych.tests.helpers.single import alone

MODEL = small_model(heads=4, kv_heads=2, tied=False)
BAR = 1e-5
"""Largest difference / largest element of the ViT's output; measured: 3.1e-6."""
GRID = (1, 4, 6)


def saved_vit(form: str, folder: Path, vision: VisionConfig, **options: Any) -> tuple[Any, Path]:
    """A CLIP ViT, and the folder that one of its layouts is in."""
    model = clip_vit(vision, **options)
    if form == "CLIPVisionModel":
        model.save_pretrained(folder / form)
    elif form == "CLIPModel":
        save_clip_model(model, folder / form)
    else:
        save_open_clip(model, folder / form)
    return model, folder / form


FORMS = ("CLIPVisionModel", "CLIPModel", "open_clip")


def vision_part(folder: Path, model: ModelConfig = MODEL) -> StartingPart:
    (part,) = open_parts(InitConfig(vision=str(folder)), model, Path("no tokenizer"))
    return part


def language_part(folder: Path, model: ModelConfig, tokenizer: Path = Path("x")) -> StartingPart:
    (part,) = open_parts(InitConfig(language=str(folder)), model, tokenizer)
    return part


# --- a CLIP ViT


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with alone() as mesh:
        yield mesh


def tower_of(part: StartingPart, mesh: Mesh) -> VisionTower:
    kernels = choose(Kernels.auto, Precision.fp32, Installed.here())
    [place] = mesh.places(1)
    tower = VisionTower(MODEL.vision, ParallelConfig(), Precision.fp32, place, kernels)
    for name, parameter in global_parameters([torch.nn.ModuleDict({"vision": tower})]):
        parameter.data.fill_(torch.nan)
        part.fill(name, parameter, 0, 1)
    return tower


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_the_tower_with_positions_aside_equals_clips_layers(form, eps, tmp_path, mesh):
    """4.8e-7 apart; with CLIP's own epsilon of the norms, 1e-5 where ours is 1e-6, 3.1e-6."""
    clip, folder = saved_vit(form, tmp_path, MODEL.vision, eps=eps)
    tower = tower_of(vision_part(folder), mesh)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (GRID[1] * GRID[2], 3, 1, 14, 14), dtype=np.uint8)
    pixels = np.repeat(picture, 2, axis=2).reshape(len(picture), -1)  # two identical frames

    frame = normalized(pixels).float().reshape(-1, 3, 2, 14, 14)[:, :, 0]
    with torch.no_grad():
        patches_PE = clip.embeddings.patch_embedding(frame).flatten(1)
        want = clip.encoder(inputs_embeds=patches_PE[None]).last_hidden_state[0]
        layout = PatchLayout.of(torch.tensor([GRID]), MODEL.vision)
        got = tower(torch.tensor(pixels), replace(layout, positions=layout.positions * 0))
        turned = tower(torch.tensor(pixels), layout)
    apart = float(((got - want).abs().max() / want.abs().max()).detach())
    print(f"{form}, epsilon {eps}: {apart:.1e}")
    assert apart <= BAR
    assert not torch.allclose(turned, got, atol=1e-2)  # positions do turn it


def test_every_tensors_fate_is_listed(tmp_path):
    _, folder = saved_vit("open_clip", tmp_path, MODEL.vision)
    qwen2(replace(MODEL.language, vocab_size=60)).save_pretrained(tmp_path / "text")
    parts = open_parts(
        InitConfig(language=str(tmp_path / "text"), vision=str(folder)), MODEL, Path("x")
    )
    lines = table_of_fates(parts, name_table(MODEL)).splitlines()
    expected = [
        f"init.language={tmp_path / 'text'}",
        f"  transformed  model.embed_tokens.weight -> {EMBEDDING} "
        "(60 rows; 4 more are drawn at random)",
        "  taken        model.layers.*.input_layernorm.weight -> "
        "language.decoder.layers.*.input_layernorm.weight (4 layers)",
        "  transformed  model.layers.*.mlp.gate_proj.weight + model.layers.*.mlp.up_proj.weight -> "
        "language.decoder.layers.*.mlp.linear_fc1.weight (4 layers) (joined)",
        f"init.vision={folder}",
        "  transformed  visual.conv1.weight -> vision.patch_embed.weight "
        "(an equal share for each frame)",
        "  dropped      2 tensors (of other parts than the ViT)",
        "  dropped      visual.class_embedding (no class token)",
        "  dropped      visual.positional_embedding (positions are rotary)",
        "  dropped      visual.ln_pre.bias (no norm before the layers)",
        "neither has",
        "  initialised  merger.fc1.weight",
    ]
    assert [line for line in expected if line not in lines] == []
    told = "\n".join(lines)
    for part in parts:  # each tensor of the folders, and each parameter of ours
        for name in part.tensors:
            of_others = part.dropped.get(name, "").startswith("of other")
            assert of_others or re.sub(r"\.\d+\.", ".*.", name) in told
    assert all(re.sub(r"\.\d+\.", ".*.", name) in told for name in name_table(MODEL))


# --- the towers of Qwen


@pytest.mark.parametrize("kind", ["plain", "windowed"])
def test_the_tower_of_a_qwen_model_is_taken_as_an_import_takes_it(kind, tmp_path):
    model = small_model(heads=4, kv_heads=2, tied=False, tower=kind)
    if kind == "plain":
        save_reference(transformers_model(model, seed=1), tmp_path)
    else:
        qwen2_5_vl(model.vision).save_pretrained(tmp_path)
    part = vision_part(tmp_path, model)
    table = name_table(model)
    assert part.entries.keys() == {name for name in table if name.startswith("vision.")}
    for name, entry in part.entries.items():
        whole = filled(part, name, entry.shape)
        pieces = [part.tensors[theirs][:] for theirs in table[name].theirs]
        assert torch.equal(whole, table[name].transform.to_ours(pieces)), name
        check_pieces(part, name, whole)
    assert "visual.merger.mlp.0.weight" in part.dropped


def filled(part: StartingPart, name: str, shape: tuple[int, ...], rank=0, tp=1) -> Tensor:
    tensor = torch.full(shape, torch.nan)
    part.fill(name, tensor, rank, tp)
    return tensor


def check_pieces(part: StartingPart, name: str, whole: Tensor, tp: int = 2) -> None:
    sharding = part.entries[name].sharding
    for rank in range(tp):
        want = shard(whole, sharding, rank, tp)
        assert torch.equal(filled(part, name, tuple(want.shape), rank, tp), want), name


# --- a language model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [50, 64, 80])
def test_rows_of_the_vocabulary_are_taken_as_far_as_both_have_them(rows, tied, tmp_path):
    model = small_model(heads=4, kv_heads=2, tied=tied)
    theirs = qwen2(replace(model.language, vocab_size=rows))
    theirs.save_pretrained(tmp_path)
    part = language_part(tmp_path, model)
    assert part.drawn_in_part == ([EMBEDDING, HEAD] if rows < 64 else [])
    for name in (EMBEDDING, HEAD):
        source = theirs.model.embed_tokens if tied or name == EMBEDDING else theirs.lm_head
        for rank, tp in ((0, 1), (0, 2), (1, 2), (3, 4)):
            size = 64 // tp
            got = filled(part, name, (size, model.language.hidden_size), rank, tp)
            want = source.weight[rank * size : (rank + 1) * size]
            assert torch.equal(got[: len(want)], want)
            assert got[len(want) :].isnan().all()


# --- a run


@pytest.mark.distributed
def test_a_run_starts_from_both_in_any_layout(pool, digits, tmp_path):
    runs = Runs(pool, digits, tmp_path)
    model = load_config(SMALL).model
    _, vit = saved_vit("open_clip", tmp_path, model.vision)
    text = replace(model.language, vocab_size=400)  # fewer rows than the model's 512
    qwen2(text).save_pretrained(tmp_path / "text")
    words = [
        *("stage=1", "stage.vit.train=false", "train.num_steps=1", "init.allow_random=false"),
        *(f"init.language={tmp_path / 'text'}", f"init.vision={vit}"),
    ]
    first = runs.train("one", "single", *words)
    assert "  initialised  merger.fc1.weight" in first
    assert f"{EMBEDDING} (400 rows; 112 more are drawn at random)" in first
    runs.train("four", "tp2 pp2", *words)
    assert losses(runs.dir("four")) == pytest.approx(losses(runs.dir("one")), rel=2e-6)

    one, four = (pool(1).run(weights_of, run=runs.dir(name))[0] for name in ("one", "four"))
    vision, language = vision_part(vit, model), language_part(tmp_path / "text", model)
    for name in one:
        if name.startswith("merger."):
            continue  # trained for a step
        assert torch.equal(one[name], four[name]), name
        part = vision if name.startswith("vision.") else language
        want = filled(part, name, tuple(one[name].shape))
        assert torch.equal(one[name][: len(want)][~want.isnan()], want[~want.isnan()]), name
    drawn = one[EMBEDDING][400:]
    assert float(drawn.std()) == pytest.approx(EMBEDDING_STD, rel=0.05)


def weights_of(run: Path) -> dict[str, Tensor]:
    (folder,) = (run / "checkpoints").glob("step_*")
    model = read_model(folder)
    table = {name: entry for name, entry in name_table(model).items() if entry.exported}
    weights = {name: torch.full(entry.shape, torch.nan) for name, entry in table.items()}
    mesh = build_mesh(1, 1, seed=0, timeout_s=HANG_S)
    stored = StoredTensors.open(folder / "shards", mesh.world)
    stored.read_whole(WEIGHTS, weights, mesh, sharding_table(model))
    return weights


# --- what is refused


def test_another_language_model_is_refused_with_every_difference(tmp_path):
    other = replace(MODEL.language, num_layers=2, num_kv_heads=4, tie_word_embeddings=True)
    qwen2(other, rope_theta=5e5).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as error:
        language_part(tmp_path, MODEL)
    title, *lines = str(error.value).splitlines()
    assert title == f"init.language={tmp_path} does not fit model.name=small:"
    expected = [
        "  model.language.num_layers=4, the folder has 2",
        "  model.language.num_kv_heads=2, the folder has 4",
        "  model.language.tie_word_embeddings=False, the folder has True",
        "  model.language.rope_theta=1000.0, the folder has 500000.0",
        "  missing: lm_head.weight",
        "  missing: model.layers.*.mlp.up_proj.weight (2 of them)",
        "  mis-shaped: model.layers.0.self_attn.k_proj.weight is (64, 64), the model has (32, 64)",
    ]
    assert [line for line in expected if line not in lines] == []


def test_a_vit_that_no_tensor_tells_from_ours_is_refused(tmp_path):
    """Heads and activation: the shapes are the same."""
    heads = replace(MODEL.vision, num_heads=2)
    for form in FORMS:
        _, folder = saved_vit(form, tmp_path, heads, activation="gelu")
        with pytest.raises(CheckpointError) as error:
            vision_part(folder)
        assert str(error.value).splitlines()[1:] == [
            "  model.vision.num_heads=4, the folder has 2",
            "  model.vision.mlp=quick_gelu, the folder has gelu",
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.ls_1.gamma": torch.ones(3)}, "unexpected: visual.ls_1.gamma"),
        ({"visual.transformer.resblocks.1.ln_1.bias": None}, "missing: visual.transformer.resbl"),
        ({"visual.conv1.weight": None}, "holds no ViT that is known  -> a CLIP ViT as transf"),
    ],
)
def test_tensors_of_another_vit_are_refused(change, message, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = saved_vit("open_clip", tmp_path, MODEL.vision)
    state = load_file(folder / "open_clip_model.safetensors") | change
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, folder / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        vision_part(folder)


def test_what_does_not_fit_is_told_of_both_folders(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "text" / "pytorch_model.bin").write_bytes(b"not a pickle")
    init = InitConfig(language=str(tmp_path / "text"), vision=str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        open_parts(init, MODEL, Path("x"))
    first, second = str(error.value).splitlines()
    assert "pytorch_model.bin cannot be read" in first
    assert f"{tmp_path} holds neither model.safetensors" in second


def test_a_language_model_of_another_vocabulary_is_refused(tmp_path):
    for name, text in (("ours", "read the digits"), ("theirs", "fünf Ziffern lesen")):
        train_tokenizer([text], tmp_path / name, 280)
    model = small_model(heads=4, kv_heads=2, tied=False, vocab_size=300)
    qwen2(model.language).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"\d+ of its \d+ tokens are not those of .*ours: '"):
        language_part(tmp_path / "theirs", model, tmp_path / "ours")
    language_part(tmp_path / "theirs", model, tmp_path / "theirs")


def test_a_tokenizer_without_the_vision_tokens_is_refused_with_their_ids(tmp_path):
    from triptych.data.tokenizer import load_tokenizer

    train_tokenizer(["read the digits"], tmp_path, 280)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    text_only = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    content["added_tokens"] = [x for x in content["added_tokens"] if x["content"] in text_only]
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {
        token if token in text_only or not token.startswith("<|") else f"x{token}": i
        for token, i in vocab.items()
    }
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        load_tokenizer(tmp_path)
    assert "<|vision_start|> (151652), <|vision_end|> (151653), <|image_pad|> (151655)" in str(
        error.value
    )
    assert "or Qwen2.5 model; that of a Qwen2 text model has none" in str(error.value)

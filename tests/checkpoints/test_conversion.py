"""Hugging Face folder -> checkpoint -> Hugging Face folder, by the commands that a person types.

And a run that starts from what was imported. Whoever takes ``imported`` or ``exported`` is marked
``distributed``, too: of the processes of ``make test`` only one makes these folders.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import triptych
from triptych.checkpoints.hf import folder_writer
from triptych.checkpoints.hf.conversion import import_hf
from triptych.checkpoints.hf.model_config import hf_config
from triptych.checkpoints.hf.name_table import name_table
from triptych.checkpoints.hf.tensor_files import INDEX, SINGLE
from triptych.checkpoints.model_file import read_model
from triptych.checkpoints.run_state import WEIGHTS
from triptych.checkpoints.stored_tensors import StoredTensors
from triptych.configs.compose import load_config
from triptych.configs.validate import validate
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import load_tokenizer, train_tokenizer
from triptych.errors import CheckpointError, ConfigError
from triptych.launch import convert
from triptych.models.qwen_vl.sharding_table import sharding_table
from triptych.parallel.mesh import build_mesh
from triptych.tests.helpers.limits import HANG_S
from triptych.tests.helpers.reference import save_reference, small_model, transformers_model
from triptych.train.data import Mixture
from triptych.train.run import pretrain

ROOT = Path(triptych.__file__).parent
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CAPTION = "A grey square, wider than high."
NAME = "Tiny-VL.{}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([CAPTION], folder, 300)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tokenizer) -> dict[bool, Path]:
    """Folders as from the hub, by whether the embedding is tied."""
    root = tmp_path_factory.mktemp("hub")
    folders = {}
    for tied in (True, False):
        model = small_model(heads=4, kv_heads=2, tied=tied, vocab_size=320)
        folders[tied] = root / NAME.format("tied" if tied else "untied")
        shutil.copytree(tokenizer, folders[tied])
        save_reference(transformers_model(model, seed=int(tied)), folders[tied])
    return folders


@pytest.fixture(scope="module")
def imported(tmp_path_factory, hub) -> dict[bool, Path]:
    """The tied model by one process, the untied one by two."""
    root = tmp_path_factory.mktemp("imported")
    for tied, launcher in ((True, PYTHON), (False, TORCHRUN)):
        done = command(launcher, "convert.py", "import", hub[tied], root / str(tied))
        assert done.returncode == 0, done.stderr
        name = hub[tied].name
        assert done.stdout.splitlines() == [  # one rank speaks
            str(root / str(tied) / "checkpoints" / "step_000000000.0"),
            f"its sizes: {root / str(tied) / 'model' / name}.yaml",
            f"start from it: --config-dir {root / str(tied)} model={name} "
            f"init.checkpoint={root / str(tied)}",
        ]
    return {tied: root / str(tied) for tied in (True, False)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, imported, tokenizer, pool) -> dict[bool, Path]:
    """The tied model by its command, the untied one by a rank that has started already."""
    root = tmp_path_factory.mktemp("exported")
    words = {
        tied: ["export", str(imported[tied]), str(root / str(tied)), "--tokenizer", str(tokenizer)]
        for tied in (True, False)
    }
    done = command(PYTHON, "convert.py", *words[True])
    assert done.returncode == 0, done.stderr
    pool(1).run(convert.main, argv=words[False])
    return {tied: root / str(tied) for tied in (True, False)}


def command(launcher: list[str], script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a launcher's script as a person would, from another folder."""
    return subprocess.run(
        [*launcher, str(ROOT / "launch" / script), *map(str, words)],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


# --- there and back


@pytest.mark.torchrun
@pytest.mark.distributed
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_an_export_bit_for_bit(tied, hub, exported):
    from transformers import Qwen2VLForConditionalGeneration as Theirs

    assert (exported[tied] / "tokenizer.json").exists()
    again, report = Theirs.from_pretrained(exported[tied], output_loading_info=True)
    assert not any(report.values()), report
    want, got = Theirs.from_pretrained(hub[tied]).state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.torchrun
@pytest.mark.distributed
def test_an_export_in_bf16_is_the_weights_rounded(exported, imported, tokenizer, pool, tmp_path):
    words = ["export", str(imported[True]), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    pool(1).run(convert.main, argv=[*words, "--dtype", "bf16"])
    want, got = (load_file(folder / SINGLE) for folder in (exported[True], tmp_path / "out"))
    assert want.keys() == got.keys()
    assert {tensor.dtype for tensor in want.values()} == {torch.float32}
    assert all(torch.equal(want[name].bfloat16(), got[name]) for name in want)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.torchrun
@pytest.mark.distributed
@pytest.mark.parametrize("tied", [True, False])
def test_importing_an_export_gives_the_same_checkpoint(tied, imported, exported, pool, tmp_path):
    """The first time one process imported the tied model and two the untied; now it is reversed."""
    pool(2 if tied else 1).run(import_again, source=exported[tied], output=tmp_path)
    (want,) = pool(1).run(weights_of, run=imported[tied])
    (got,) = pool(1).run(weights_of, run=tmp_path)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def import_again(source: Path, output: Path) -> None:
    import_hf(source, output)


def weights_of(run: Path) -> dict[str, Tensor]:
    """Every tensor of an imported checkpoint, whole."""
    folder = run / "checkpoints" / "step_000000000.0"
    model = read_model(folder)
    weights = {
        name: torch.full(entry.shape, torch.nan)
        for name, entry in name_table(model).items()
        if entry.exported
    }
    mesh = build_mesh(1, 1, seed=0, timeout_s=HANG_S)
    stored = StoredTensors.open(folder / "shards", mesh.world)
    stored.read_whole(WEIGHTS, weights, mesh, sharding_table(model))
    return weights


# --- a run that starts from an import


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer) -> Path:
    """Eight times the same image and caption: whatever is packed, the mean loss is one sample's."""
    folder = tmp_path_factory.mktemp("data")
    Image.radial_gradient("L").resize((150, 90)).convert("RGB").save(folder / "a.png")
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": CAPTION}]
    (folder / "in.jsonl").write_text(8 * (json.dumps({"content": content}) + "\n"))
    reader = load_tokenizer(tokenizer)
    build_dataset([folder / "in.jsonl"], folder / "pairs", reader, images=[folder])
    return folder


def run_from(imported: Path, model: str, data: Path, tokenizer: Path, run: Path) -> list[str]:
    """A run of one step, as its command line; the data group lies beside the imported model."""
    group = {
        "tokenizer": str(tokenizer),
        "sources": {"pairs": {"path": str(data / "pairs")}},
        "mixtures": {"stage2": {"pairs": 1.0}},
    }
    (imported / "data").mkdir(exist_ok=True)
    (imported / "data" / "pairs.yaml").write_text(yaml.safe_dump(group))
    return [
        *("--config-dir", str(imported), f"model={model}", f"init.checkpoint={imported}"),
        *("data=pairs", "stage=2", "train.precision=fp32", f"run.dir={run}"),
        *("train.num_steps=1", "train.seq_len=128", "train.global_batch_size=2"),
        "data.max_pixels=50176",
    ]


@pytest.mark.torchrun
@pytest.mark.distributed
def test_a_run_starts_from_what_was_imported(imported, exported, data, tokenizer, tmp_path):
    """The command that the import printed works, and its first loss is that of transformers, which
    reads image and caption by its own processors.
    """
    words = run_from(imported[True], NAME.format("tied"), data, tokenizer, tmp_path / "run")
    done = command(PYTHON, "pretrain.py", *words)
    assert done.returncode == 0, done.stderr
    assert f"weights: {imported[True]}/checkpoints/step_000000000.0" in done.stdout
    (step,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    theirs = loss_of_transformers(exported[True], data / "a.png")
    assert json.loads(step)["loss"] == pytest.approx(theirs, rel=2e-6)


def loss_of_transformers(folder: Path, image: Path) -> float:
    """Mean over caption and end of text."""
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        Qwen2VLForConditionalGeneration,
    )

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(
        Image.open(image), return_tensors="pt"
    )
    num_pads = int(pixels["image_grid_thw"].prod()) // 4
    caption = AutoTokenizer.from_pretrained(folder)(CAPTION + "<|endoftext|>").input_ids
    tokens = read_tokens(folder)
    block = [tokens["vision_start"], *[tokens["image_pad"]] * num_pads, tokens["vision_end"]]
    ids = torch.tensor([block + caption])
    labels = torch.tensor([[-100] * len(block) + caption])
    with torch.no_grad():
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == tokens["image_pad"]).int(),
            labels=labels,
            **pixels,
        )
    return float(out.loss)


def read_tokens(folder: Path) -> dict[str, int]:
    config = json.loads((folder / "config.json").read_text())
    return {
        "vision_start": config["vision_start_token_id"],
        "vision_end": config["vision_end_token_id"],
        "image_pad": config["image_token_id"],
    }


OTHER_MODELS = {
    "sizes": (
        ["vision.depth=1", "language.num_layers=5", "language.tie_word_embeddings=false"],
        [
            "model.vision.depth=1, the checkpoint has 2",
            "model.language.num_layers=5, the checkpoint has 4",
            "model.language.tie_word_embeddings=False, the checkpoint has True",
            "missing: model.language.decoder.layers.4.input_layernorm.weight (64,)",
            "missing: model.language.output_layer.weight (320, 64)",
            "unexpected: model.vision.decoder.layers.1.input_layernorm.bias (64,)",
        ],
    ),
    "shapes": (
        ["language.intermediate_size=112"],
        [
            "model.language.intermediate_size=112, the checkpoint has 96",
            "mis-shaped: model.language.decoder.layers.*.mlp.linear_fc2.weight is (64, 96), "
            "this model has (64, 112)",
        ],
    ),
    "heads and rope, which no tensor shows": (
        [
            *("language.num_heads=2", "language.num_kv_heads=1", "language.head_dim=32"),
            *("language.mrope_section=[4,6,6]", "language.rope_theta=10000.0"),
        ],
        [
            "model.language.num_heads=2, the checkpoint has 4",
            "model.language.num_kv_heads=1, the checkpoint has 2",
            "model.language.head_dim=32, the checkpoint has 16",
            "model.language.rope_theta=10000.0, the checkpoint has 1000.0",
            "model.language.mrope_section=[4, 6, 6], the checkpoint has [2, 3, 3]",
        ],
    ),
}


@pytest.mark.torchrun
@pytest.mark.distributed
@pytest.mark.parametrize("which", OTHER_MODELS)
def test_a_checkpoint_of_another_model_is_refused_with_all_differences(
    which, imported, data, tokenizer, pool, tmp_path
):
    changes, expected = OTHER_MODELS[which]
    words = run_from(imported[True], NAME.format("tied"), data, tokenizer, tmp_path / "run")
    (message,) = pool(1).run(refusal, words=[*words, *(f"model.{change}" for change in changes)])
    title, *lines, remedy = message.splitlines()
    assert remedy.startswith("  -> name the model and sizes that it has")
    assert title == f"{imported[True]}/checkpoints/step_000000000.0 is of another model:"
    assert not [line for line in expected if not any(line in found for found in lines)], message
    if which.startswith("heads"):
        assert len(lines) == len(expected)


def refusal(words: list[str]) -> str:
    config = load_config(words)
    validate(config, world_size=1)
    with pytest.raises(CheckpointError) as error:
        pretrain(config)
    return str(error.value)


def test_a_model_with_fewer_tokens_than_the_tokenizer_is_refused(tokenizer):
    config = load_config(["model.language.vocab_size=200", f"data.tokenizer={tokenizer}"])
    with pytest.raises(ConfigError, match=r"has 29\d tokens, more than .*vocab_size=200"):
        Mixture.open(config, {})


# --- what is refused


@pytest.mark.torchrun
def test_errors_are_one_line_and_an_exit_code(tmp_path):
    done = command(PYTHON, "convert.py", "import", tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 1
    message = f"CheckpointError: {tmp_path}/nowhere is no Hugging Face model: no config.json\n"
    assert done.stderr == message
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch():
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['convert.py', '--help'];"
        f"runpy.run_path({str(ROOT / 'launch' / 'convert.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python launch/convert.py import Qwen2-VL-7B-Instruct runs/imported" in done.stdout


def test_wrong_sources_of_an_import(hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"is no Hugging Face model: no config\.json"):
        convert.main(["import", str(tmp_path), str(tmp_path / "out")])
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(CheckpointError, match="model_type='qwen2_5_vl', known is 'qwen2_vl'"):
        convert.main(["import", str(other), str(tmp_path / "out")])
    without_tokenizer = tmp_path / "without"
    shutil.copytree(hub[True], without_tokenizer, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match=r"ids up to 151645, beyond vocab_size=320 -> put"):
        convert.main(["import", str(without_tokenizer), str(tmp_path / "out")])
    larger = tmp_path / "larger"
    shutil.copytree(hub[True], larger)
    model = replace(small_model(heads=4, kv_heads=2, tied=True, vocab_size=400), name="larger")
    (larger / "config.json").write_text(json.dumps(hf_config(model)))
    with pytest.raises(CheckpointError, match=r"mis-shaped: model\.embed_tokens\.weight is \(320"):
        convert.main(["import", str(larger), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.torchrun
@pytest.mark.distributed
def test_an_import_does_not_add_to_a_folder_that_has_checkpoints(hub, imported):
    with pytest.raises(CheckpointError, match=r"step_000000000\.0 is there already -> name anoth"):
        convert.main(["import", str(hub[True]), str(imported[True])])


@pytest.mark.distributed
def test_more_ranks_than_kv_heads_are_refused(hub, pool, tmp_path):
    expected = (
        "1 problem in this run\n  --nproc-per-node=4 must divide model.language.num_kv_heads=2"
        "  -> try --nproc-per-node=1 or --nproc-per-node=2"
    )
    assert pool(4).run(refused_import, source=hub[True], output=tmp_path / "out") == [expected] * 4
    assert not (tmp_path / "out").exists()


def refused_import(source: Path, output: Path) -> str:
    with pytest.raises(ConfigError) as error:
        import_hf(source, output)
    return str(error.value)


@pytest.mark.torchrun
@pytest.mark.distributed
def test_several_ranks_export_what_one_does(imported, exported, tokenizer, pool, tmp_path):
    """Six files for two ranks."""
    out = tmp_path / "out"
    pool(2).run(export_by_ranks, source=imported[True], output=out, tokenizer=tokenizer)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)]
    index = json.loads((out / INDEX).read_text())
    want, got = load_file(exported[True] / SINGLE), {}
    for file in files:
        part = load_file(out / file)
        got |= part
        assert {index["weight_map"][name] for name in part} == {file}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def export_by_ranks(source: Path, output: Path, tokenizer: Path) -> None:
    small = mock.patch.object(folder_writer, "MAX_SHARD_BYTES", 300_000)
    with small:
        convert.main(["export", str(source), str(output), "--tokenizer", str(tokenizer)])


@pytest.mark.torchrun
@pytest.mark.distributed
def test_wrong_words_of_an_export(hub, imported, exported, tokenizer, tmp_path):
    def export(source: Path, output: Path, by: Path) -> None:
        convert.main(["export", str(source), str(output), "--tokenizer", str(by)])

    with pytest.raises(CheckpointError, match="is there already -> name another, or remove it"):
        export(imported[True], exported[True], tokenizer)
    with pytest.raises(CheckpointError, match="is a Hugging Face model -> convert it"):
        export(hub[True], tmp_path / "out", tokenizer)
    with pytest.raises(CheckpointError, match="does not exist"):
        export(tmp_path / "nowhere", tmp_path / "out", tokenizer)
    with pytest.raises(ConfigError):
        export(imported[True], tmp_path / "out", tmp_path)
    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, other)
    content = (other / "tokenizer.json").read_text()
    content = content.replace("<|im_start|>", "<|x|>").replace("<|im_end|>", "<|im_start|>")
    (other / "tokenizer.json").write_text(content.replace("<|x|>", "<|im_end|>"))
    with pytest.raises(ConfigError) as error:
        export(imported[True], tmp_path / "out", other)
    assert str(error.value).splitlines() == [
        f"{other} is the tokenizer of another model:",
        "  <|im_start|> is 2, the model has 1",
        "  <|im_end|> is 1, the model has 2",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]

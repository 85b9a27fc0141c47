"""What a person sees who does everything wrong: what, where, the bound, what to type next.

Nothing is lost by it, and no rank is left waiting.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from triptych.checkpoints.locate import locate
from triptych.configs.compose import load_config
from triptych.configs.overrides import schema_keys
from triptych.configs.schema import Config
from triptych.configs.validate import validate
from triptych.data.dataset.dataset import Dataset
from triptych.data.digits import make as digits_module
from triptych.data.digits.make import make_digits
from triptych.errors import CheckpointError, ConfigError, DataError
from triptych.launch import cli, prepare
from triptych.parallel.agree import SingleProcess
from triptych.parallel.replicas import Drift
from triptych.parallel.zero.protocol import ShardedOptimizer
from triptych.tests.helpers.runs import Runs, checkpoint_names, losses, refusal

SENSELESS = ("nan", "abc", "{a: 1}", "${oc.env:HOME}")
"""Values of a wrong type or of none; every key must take or refuse them without a traceback."""


# --- the command line


@pytest.mark.parametrize("value", SENSELESS)
def test_senseless_values_of_sections_are_refused(value):
    """Of single values OmegaConf knows the type; whole sections are our own to check."""
    sections = {key.rpartition(".")[0] for key in schema_keys()} - {""}
    for section in sections:
        with pytest.raises(ConfigError):
            load_config([f"{section}={value}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stage=2 stage=3", "stage=2 stage=3: a run has one stage  -> try stage=2 or stage=3"),
        ("train=5", "train holds several values +-> try train.num_steps=VALUE, "),
        ("stage.llm.lr=inf", "stage.llm.lr=inf must be a finite number  -> try stage.llm.lr=NUM"),
        ("optimizer.eps=nan", "optimizer.eps=nan must be a finite number"),
        ("seed=-1", "seed=-1 must be at least 0  -> try seed=0"),
        ("seed=4294967296", "seed=4294967296 must be below 2..32 = 4294967296  -> try seed=0"),
        ("run.dir=''", "run.dir is empty  -> try run.dir=FOLDER"),
        ("model.language.rope_theta=-1", "rope_theta=-1.0 must be above 0  -> try .*=1e6"),
        ("model.language.rms_norm_eps=0", "rms_norm_eps=0.0 must be above 0  -> try"),
    ],
)  # fmt: skip
def test_what_no_type_forbids_a_rule_does(words, message):
    with pytest.raises(ConfigError, match=message):
        validate(load_config(words.split()), world_size=1)


# --- records and pictures


@pytest.fixture
def pictures(tmp_path) -> Path:
    """One good picture outside of the folder, and all kinds of others in it."""
    folder = tmp_path / "pictures"
    (folder / "folder.png").mkdir(parents=True)
    red = Image.new("RGB", (60, 40), (200, 30, 30))
    red.save(tmp_path / "outside.png")
    red.convert("CMYK").save(folder / "cmyk.jpg")
    Image.new("RGB", (1, 1)).save(folder / "1x1.png")
    Image.new("RGB", (10000, 10)).save(folder / "long.png")
    Image.new("RGBA", (40, 40), (0, 0, 255, 0)).save(folder / "rgba.png")
    Image.fromarray(np.full((30, 30), 40000, np.uint16)).save(folder / "16bit.png")
    frames = [Image.new("P", (60, 40), colour) for colour in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / "cut.png").write_bytes((tmp_path / "outside.png").read_bytes()[:60])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    (folder / "dangling.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    return folder


GOOD = ("cmyk.jpg", "1x1.png", "rgba.png", "16bit.png", "animated.gif")
BAD = {
    "long.png": "10000x10 pixels; one side may be at most 200 times the other",
    "cut.png": "cannot be decoded as an image",
    "empty.png": "the file is empty",
    "text.png": "cannot be decoded as an image",
    "dangling.png": "cannot be read: .*No such file",
    "folder.png": "cannot be read: .*Is a directory",
    "missing.png": "cannot be read: .*No such file",
    "http://host/a.png": "is not a path: download images first",
    "a\0b": "cannot be read: embedded null byte",
    "../outside.png": "leads out of the folders of media, to .*  -> .*--images",
    "file:///etc/passwd": "leads out of the folders of media, to /etc/passwd",
    "/dev/zero": "leads out of the folders of media, to /dev/zero",
    "pipe.png": "cannot be read: it is no regular file",
}
BAD_LINES = {
    "{broken": "not JSON",
    "[]": "a record must be an object",
    '{"text": 5}': "text must be a string",
    '{"text": ""}': "a document without text",
    '{"text": "\\ud800"}': "half of a surrogate pair",
    '{"messages": []}': "messages must be a list of turns",
    '{"messages": [{"role": "user", "content": "hi"}]}': "no assistant turn",
    '{"messages": [{"role": "bot", "content": "hi"}]}': "role is 'bot'; it must be one of",
    '{"text": "a", "content": "b"}': "needs one of the keys",
    '{"content": [{"type": "audio", "audio": "x.mp3"}]}': "it must be text, image, video",
    '{"text": "cut': "not JSON",
}


def picture(path: str) -> str:
    parts = [{"type": "image", "image": path}, {"type": "text", "text": " a thing"}]
    return json.dumps({"content": parts})


def test_a_bad_sample_is_left_out_with_its_reason_and_the_rest_is_kept(pictures, digits, tmp_path):
    records = tmp_path / "records.jsonl"
    bad = {picture(path): reason for path, reason in BAD.items()} | BAD_LINES
    lines = [*map(picture, GOOD), *bad]
    records.write_text("\n".join(lines) + "\n\n")
    words = f"--input {records} --images {pictures} --tokenizer {digits / 'tokenizer'}"
    output = tmp_path / "dataset"
    prepare.main([*words.split(), "--output", str(output), "--on-bad", "skip"])

    assert len(Dataset.open(output, "kept")) == len(GOOD)
    told = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [line["line"] for line in told] == list(range(len(GOOD) + 1, len(lines) + 1))
    for line, reason in zip(told, bad.values(), strict=True):
        assert re.search(reason, line["reason"]), line

    for content, message in {
        lines[-1]
        + "\n"
        + lines[0]: "records.jsonl:1: not JSON.*-> mend it, or leave such samples out",
        lines[-1]: "records.jsonl:1: not JSON.*-> mend the input: of its first 1 records none",
        "": "records.jsonl: no usable sample, 0 bad ones  -> check the files given as --input",
    }.items():
        records.write_text(content)
        with pytest.raises(DataError, match=message):
            prepare.main([*words.split(), "--output", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("size", ["0", "-3", "many"])
def test_a_shard_size_that_is_none(size, capsys):
    with pytest.raises(SystemExit):
        prepare.parse_args(f"--input a --tokenizer b --output c --shard-mb {size}".split())
    assert f"{size} must be a whole number from 1 on" in capsys.readouterr().err


# --- dataset folders


def test_an_index_of_text_with_a_flipped_bit_is_noticed_when_it_is_read(digits, tmp_path):
    shutil.copytree(digits / "strings", tmp_path / "strings")
    index = tmp_path / "strings" / "text.idx"
    content = bytearray(index.read_bytes())
    content[34 + 4 * 5] ^= 1  # the length of sample 5
    dataset = Dataset.open(tmp_path / "strings", "strings")
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"text.idx is damaged: its .*; copy the file again"):
        dataset.sample(5)


def test_a_tokenizer_folder_without_one(digits, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    words = ["data.generate=false", f"data.root={digits}", f"data.tokenizer={tmp_path}/tokenizer"]
    config = load_config([*words, f"run.dir={tmp_path / 'run'}"])
    validate(config, world_size=1)
    from triptych.data.tokenizer import load_tokenizer

    with pytest.raises(ConfigError, match=r"holds no tokenizer: neither tokenizer.json nor vocab"):
        load_tokenizer(config.data.tokenizer)


def test_of_two_runs_that_make_the_sample_data_at_once_both_go_on(tmp_path, monkeypatch):
    sizes = {"num_images": 20, "num_samples": 20}
    make_digits(tmp_path / "first", **sizes)
    root, make = tmp_path / "sample_data", digits_module._make

    def make_while_another_finishes(*arguments: Any) -> None:
        make(*arguments)
        shutil.copytree(tmp_path / "first", root)

    monkeypatch.setattr(digits_module, "_make", make_while_another_finishes)
    make_digits(root, **sizes)
    shutil.rmtree(root)
    with pytest.raises(DataError, match="sample_data"):
        make_digits(root, num_images=30, num_samples=30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "sample_data"]


@pytest.mark.distributed
def test_the_first_picture_that_cannot_be_read_is_told_of(pool, digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    shard = tmp_path / "data" / "strings" / "shards" / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[600::3000] = bytes(byte ^ 1 for byte in content[600::3000])
    shard.write_bytes(content)
    told = Runs(pool, tmp_path / "data", tmp_path).train(
        "run", "dp2", "train.num_steps=3", "data.max_unreadable=1.0"
    )
    assert told.count("samples that cannot be read are left out of the loss, ") == 1
    assert f"{tmp_path / 'run'}/quarantine names them and says why" in told


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: os.truncate(d / "strings/text.bin", 100), "text.bin has 100 bytes, its index"),
        (lambda d: os.truncate(d / "strings/shards/000000.tar", 9), "000000.tar has 9 bytes"),
        (lambda d: (d / "strings/dataset.yaml").unlink(), "is no dataset: dataset.yaml is missing"),
        (lambda d: shutil.copy(d / "text/text.idx", d / "strings/text.idx"), "text.idx is damaged"),
    ],
)
def test_a_spoilt_dataset_is_refused_on_every_rank(spoil, message, pool, digits, tmp_path):
    """And nothing is written for such a run."""
    shutil.copytree(digits, tmp_path / "data")
    spoil(tmp_path / "data")
    runs = Runs(pool, tmp_path / "data", tmp_path / "runs")
    text = runs.refusal("run", "dp2", "data.generate=false")
    assert text.startswith("DataError: ")
    assert message in text
    assert "  -> " in text
    assert not (tmp_path / "runs").exists()


# --- checkpoints


def test_a_run_of_which_all_checkpoints_are_damaged_is_no_start(tmp_path):
    (tmp_path / "checkpoints" / "step_000000004.0.damaged").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"^\S+ has no good checkpoint, only step_0+4.0.dam"):
        locate(tmp_path, SingleProcess())


@pytest.mark.distributed
@pytest.mark.parametrize(
    "target",
    [
        "triptych.checkpoints.direct_file.write_block",
        pytest.param("pathlib.Path.write_bytes", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_loses_nothing(target, runs):
    runs.train("run", "dp2", "train.num_steps=2")
    messages = runs.call(refusal_on_full_disk, "run", "dp2", "train.num_steps=4", target=target)
    assert len(set(messages)) == 1, messages
    assert messages[0].startswith("CheckpointError: step 4 could not be saved in ")
    assert "rank 1: [Errno 28] No space left on device" in messages[0]
    assert "what was saved before is as it was" in messages[0]
    assert checkpoint_names(runs.dir("run")) == ["step_000000002.0", "step_000000004.1.tmp"]
    runs.train("run", "dp2", "train.num_steps=4")
    assert checkpoint_names(runs.dir("run")) == ["step_000000002.0", "step_000000004.1"]
    assert len(losses(runs.dir("run"))) == 4


@pytest.mark.distributed
def test_ruined_weights_are_never_committed(runs):
    """They used to be the only checkpoint left: what ruins them shows in the step after."""
    options = ("run.checkpoint_every=1", "run.keep=1")
    runs.train("run", "dp2", *options, "train.num_steps=2")
    rates = [f"stage.{part}.lr=1e30" for part in ("vit", "adapter", "llm")]
    message = runs.refusal("run", "dp2", *options, *rates, "train.num_steps=9")
    assert message.startswith("TrainingError: step 6: "), "the third in a row"
    kept = ["step_000000001.0", "step_000000002.0", "step_000000003.1.tmp"]
    assert checkpoint_names(runs.dir("run")) == kept
    assert "step_000000002.0, step 2" in runs.train("run", "dp2", *options, "train.num_steps=4")
    assert checkpoint_names(runs.dir("run")) == ["step_000000003.1", "step_000000004.1"]


@pytest.mark.distributed
def test_a_model_that_is_not_finite_is_never_committed(runs):
    """Not even at the end of a run, where no step follows to show it."""
    runs.train("run", "dp2", "train.num_steps=1")
    messages = runs.call(refusal_of_a_ruined_model, "run", "dp2", "train.num_steps=2")
    assert len(set(messages)) == 1, messages
    assert "linear_fc2.weight is not finite: such a model is never saved  -> resume" in messages[0]
    assert checkpoint_names(runs.dir("run")) == ["step_000000001.0", "step_000000002.1.tmp"]


def refusal_of_a_ruined_model(config: Config) -> str:
    """``refusal``, with one weight of every rank infinite when it is saved."""

    def ruin(replicas: object, optimizer: ShardedOptimizer, mesh: object) -> Drift:
        shards = optimizer.state_shards().items()
        shard = next(shard for name, shard in shards if name.endswith("linear_fc2.weight"))
        shard.tensors["exp_avg_sq"][0] = float("inf")
        return Drift(0.0, "")

    with mock.patch("triptych.train.hooks.checkpoint.reduce_replicas", ruin):
        return refusal(config)


def refusal_on_full_disk(config: Config, target: str) -> str:
    """``refusal``, with a disk that has no room for what rank 1 writes by ``target``."""
    import torch.distributed as dist

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() != 1:
        return refusal(config)
    with mock.patch(target, fail):
        return refusal(config)


# --- the world outside


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "scan.png"), r"No such file: 'scan.png'$"),
        (
            OSError(errno.ENOSPC, "No space left"),
            "No space left  -> make room and type the command",
        ),
    ],
)
def test_what_the_system_refuses_is_told_without_a_traceback(error, message, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    told = told_of(error, capsys)
    assert re.search(message, told)
    assert "Traceback" not in told


def test_an_error_of_the_system_that_names_nothing_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    told = told_of(ConnectionResetError(errno.ECONNRESET, "reset"), capsys)
    assert told.startswith("Traceback")
    assert told.endswith("\nConnectionResetError: [Errno 104] reset")


def told_of(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that ends by this error writes to the terminal."""

    def main(_):
        raise error

    with pytest.raises(SystemExit, match="1"):
        cli.run(main)
    return capsys.readouterr().err.strip()


def test_an_image_that_is_not_there(tmp_path):
    """The whole command, as typed."""
    sample = Path(cli.__file__).with_name("sample.py")
    words = "--checkpoint run --tokenizer tok --image scan.png --prompt x".split()
    ended = subprocess.run(
        [sys.executable, sample, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("CheckpointError: run does not exist")
    assert "Traceback" not in ended.stderr

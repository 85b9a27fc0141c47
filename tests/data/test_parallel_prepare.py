"""The same bytes from one process, from several, from parts put together, and after kills."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from triptych.data.dataset.dataset import Dataset
from triptych.data.prepare.build_block import OnBad
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import load_tokenizer, train_tokenizer
from triptych.errors import DataError
from triptych.launch import prepare

NUM_SAMPLES = 60
BLOCK = 700
"""Bytes: some ten records."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    train_tokenizer(["A cat."], folder / "tokenizer", 280)
    for i in range(7):
        Image.new("L", (30 + i, 40), 30 * i).save(folder / f"{i}.png")
    pair, plain = '{{"image": "{}.png", "text": "A cat {}"}}', '{{"text": "cat {}"}}'
    numbers = range(NUM_SAMPLES)
    lines = [pair.format(i % 7, i) if i % 3 else plain.format(i) for i in numbers]
    lines[26] = "{"
    lines[40] = pair.format("no", 40)
    (folder / "one.jsonl").write_text("\n".join(lines[:50]) + "\n")
    (folder / "two.jsonl").write_text("\n\n".join(lines[50:]))  # no line end at its end
    return folder


def build(work, output: Path, **options):
    tokenizer = load_tokenizer(work / "tokenizer")
    inputs = [work / "one.jsonl", work / "two.jsonl"]
    options = {"block_size": BLOCK, "on_bad": OnBad.skip, "shard_size": 2000, **options}
    return build_dataset(inputs, output, tokenizer, images=[work], **options)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset, what processes make beside it left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "sizes"
    }


@pytest.fixture(scope="module")
def whole(work):
    build(work, work / "whole")
    return content(work / "whole")


def test_blocks_make_one_dataset(work, whole):
    dataset = Dataset.open(work / "whole", "whole")
    dataset.verify()
    assert len(dataset) == NUM_SAMPLES - 2
    quarantine = [json.loads(line) for line in whole["quarantine.jsonl"].splitlines()]
    assert [entry["line"] for entry in quarantine] == [27, 41]
    numbers = [i for i in range(NUM_SAMPLES) if i not in {26, 40}]
    tokenizer = load_tokenizer(work / "tokenizer")
    for i, number in enumerate(numbers):
        sample = dataset.sample(i)
        assert f"cat {number}<|endoftext|>" in tokenizer.decode(sample.input_ids.tolist())
        for media in sample.media:
            assert dataset.read_media(media) == (work / f"{number % 7}.png").read_bytes()
    shards = [str(work / "whole" / name) for name in whole if name.endswith(".tar")]
    assert len(shards) > 5
    keys = [sample["__key__"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    assert len(set(keys)) == len(keys) == sum(number % 3 > 0 for number in numbers)


def test_a_small_input_has_one_shard(work, tmp_path):
    build(work, tmp_path / "out", block_size=1 << 20, shard_size=1 << 20)
    names = [name for name in content(tmp_path / "out") if name.startswith("shards")]
    assert names == ["shards/000000.tar"]


@pytest.mark.parametrize("num_parts", [2, 5])
def test_parts_put_together_are_the_same_bytes(work, whole, tmp_path, num_parts):
    for number in random.Random(num_parts).sample(range(1, num_parts + 1), num_parts):
        assert build(work, tmp_path / "out", part=(number, num_parts)) is None
    build(work, tmp_path / "out")
    assert content(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_processes_give_the_same_bytes(work, whole, tmp_path):
    build(work, tmp_path / "out", num_processes=2)
    assert content(tmp_path / "out") == whole


def test_finished_blocks_are_not_done_again(work, whole, tmp_path):
    build(work, tmp_path / "out", part=(1, 2))
    finished = {path: path.stat().st_ino for path in (tmp_path / ".out.parts").glob("0*")}
    (tmp_path / ".out.parts/000001.elsewhere.1").mkdir()  # as a killed process leaves it
    build(work, tmp_path / "out", part=(2, 2))
    assert {path: path.stat().st_ino for path in finished} == finished
    build(work, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_another_command_does_not_go_on_with_what_is_there(work, tmp_path):
    build(work, tmp_path / "out", part=(1, 2))
    with pytest.raises(DataError, match=r"begun otherwise: shard_size: 2000 then, 9 now  -> "):
        build(work, tmp_path / "out", shard_size=9)


def test_a_bad_sample_keeps_what_is_finished_and_leaving_out_goes_on(work, whole, tmp_path):
    with pytest.raises(DataError, match=r"one\.jsonl:27: not JSON"):
        build(work, tmp_path / "out", on_bad=OnBad.fail)
    assert (tmp_path / ".out.parts/000000").is_dir()
    build(work, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def command(work, output: Path, *more: str) -> list[str]:
    inputs = [str(work / "one.jsonl"), str(work / "two.jsonl")]
    tokenizer = ["--tokenizer", str(work / "tokenizer"), "--output", str(output)]
    return ["--input", *inputs, *tokenizer, "--on-bad", "skip", *more]


def test_parts_by_command(work, tmp_path, capsys):
    prepare.main(command(work, tmp_path / "out", "--part", "1/1000"))
    assert "part 1 of 1000 is there: 58 samples  -> when all are" in capsys.readouterr().out
    prepare.main(command(work, tmp_path / "out"))
    assert "58 samples, 38 images" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert sum(report["rejects"].values()) == 2
    with pytest.raises(SystemExit):
        prepare.main(command(work, tmp_path / "out", "--part", "0/3"))


def test_a_process_that_prepares_does_not_import_torch():
    """Which would take longer than some thousand samples do."""
    child = "import sys, triptych.data.prepare.build_dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", child], check=False).returncode == 0


CHANGES_BEFORE_A_KILL = (0, 1, 2, 10, 25, 35, 50, 25, 5)
"""Of the file system, by each in its turn: those of all three blocks, then some of joining them."""
CHILD = """
import os, signal, sys; from pathlib import Path
from triptych.tests.data.test_parallel_prepare import build
from triptych.tests.helpers.known_place import after_changes
work, output, num_changes = sys.argv[1:]
after_changes(int(num_changes), lambda: os.kill(os.getpid(), signal.SIGKILL))
build(Path(work), Path(output))
"""


@pytest.mark.slow
def test_the_same_bytes_from_64_parts(work, whole, tmp_path):
    for number in random.Random(0).sample(range(1, 65), 64):
        build(work, tmp_path / "parts", part=(number, 64))
    build(work, tmp_path / "parts")
    assert content(tmp_path / "parts") == whole


@pytest.mark.slow
def test_the_same_bytes_after_kills(work, whole, tmp_path):
    output = tmp_path / "killed"
    for num_changes in CHANGES_BEFORE_A_KILL:
        child = [sys.executable, "-B", "-c", CHILD, str(work), str(output), str(num_changes)]
        assert subprocess.run(child, check=False).returncode == -signal.SIGKILL
        assert not output.exists()
    assert len(list(tmp_path.glob(f".killed.parts/{'[0-9]' * 6}"))) == 3
    build(work, output)
    assert content(output) == whole

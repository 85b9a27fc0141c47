"""From JSONL and image files to a dataset folder, and what is refused or left out on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from triptych.data.dataset.dataset import Dataset
from triptych.data.media.kinds import ImageKind
from triptych.data.prepare.build_block import OnBad
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.tokenizer import train_tokenizer
from triptych.errors import ConfigError, DataError
from triptych.launch import prepare

IMAGE = {"type": "image", "image": "a.png"}
CAPTION = {"type": "text", "text": "A grey square."}
GOOD = {"content": [IMAGE, CAPTION]}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["A grey square."], folder, 280)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return train_tokenizer(["A grey square."], tokenizer_folder, 280)


@pytest.fixture
def work(tmp_path):
    Image.new("L", (50, 40), 128).save(tmp_path / "a.png")
    Image.new("L", (60, 30), 99).save(tmp_path / "b.v2.JPG")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


def write(work: Path, lines: list[object]) -> Path:
    file = work / "in.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(text) + "\n")
    return file


def build(work, tokenizer, lines, **options):
    file = write(work, lines)
    return build_dataset([file], work / "out", tokenizer, images=[work], **options)


LATIN_1 = '{"text": "\xff"}'
BAD = {
    "json": ('{"text": "a"', "not JSON"),
    "utf-8": (LATIN_1, "not JSON"),
    "key": ({"prompt": "a"}, "one of the keys messages, content and text"),
    "missing": ({"content": [{"type": "image", "image": "no.png"}, CAPTION]}, "no.png cannot be"),
    "empty": ({"content": [{"type": "image", "image": "empty.png"}, CAPTION]}, "0 bytes"),
    "not-an-image": ({"content": [{"type": "image", "image": "in.jsonl"}, CAPTION]}, "decoded"),
    "url": ({"content": [{"type": "image", "image": "http://x/a.png"}, CAPTION]}, "is not a path"),
    "base64": ({"content": [{"type": "image", "image": "data:image/png;"}, CAPTION]}, "in base64"),
    "key-beside": ({"text": "a", "source": "web"}, "the record has source besides"),
    "spelled": ({"text": "see <image>"}, "spells <image> in its text"),
    "outside": ({"content": [{"type": "image", "image": "../a.png"}, CAPTION]}, "leads out of the"),
    "device": ({"content": [{"type": "image", "image": "/dev/zero"}, CAPTION]}, "leads out of the"),
    "pipe": ({"content": [{"type": "image", "image": "pipe.png"}, CAPTION]}, "no regular file"),
    "video": (
        {"content": [{"type": "video", "video": "a.png"}, CAPTION]},
        "cannot be decoded as a",
    ),
    "second": ({"content": [IMAGE, CAPTION, {"type": "image", "image": "no.png"}]}, "no.png"),
}


def write_bad(work, bad):
    file = write(work, [GOOD, "", bad, GOOD])
    if bad == LATIN_1:
        file.write_bytes(file.read_text().encode("latin-1"))
    return file


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD)
def test_a_bad_sample_names_file_and_line_and_leaves_nothing(work, tokenizer, bad, reason):
    file = write_bad(work, bad)
    with pytest.raises(DataError, match=rf"in\.jsonl:3: .*{reason}.*--on-bad skip"):
        build_dataset([file], work / "out", tokenizer, images=[work])
    assert not [path.name for path in work.iterdir() if "out" in path.name]


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD)
def test_a_bad_sample_can_be_left_out_whole(work, tokenizer, bad, reason):
    file = write_bad(work, bad)
    manifest = build_dataset([file], work / "out", tokenizer, images=[work], on_bad=OnBad.skip)
    assert (manifest.num_samples, manifest.num_media, manifest.num_skipped) == (2, 2, 1)
    (entry,) = (work / "out/quarantine.jsonl").read_text().splitlines()
    assert json.loads(entry)["line"] == 3
    assert reason in json.loads(entry)["reason"]
    dataset = Dataset.open(work / "out", "out")
    assert [dataset.sample(i).media[0].width for i in range(2)] == [50, 50]


@pytest.mark.parametrize("lines", [[], ["{"]])
def test_no_usable_sample_is_an_error(work, tokenizer, lines):
    with pytest.raises(DataError, match=rf"no usable sample, {len(lines)} bad ones"):
        build(work, tokenizer, lines, on_bad=OnBad.skip)
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read"):
        build_dataset([work / "absent.jsonl"], work / "out", tokenizer, images=[work])


def test_leaving_out_is_not_advised_where_nothing_is_good(work, tokenizer):
    with pytest.raises(DataError, match=r"in.jsonl:1: a.*mend the input: of its first 2 .* none"):
        build(work, tokenizer, [{"prompt": "a"}, "{"])
    with pytest.raises(DataError, match=r"in.jsonl:1: a.*mend it, or leave .*: --on-bad skip$"):
        build(work, tokenizer, [{"prompt": "a"}, "{", GOOD])
    with pytest.raises(DataError, match=r"2 bad ones; the first is \S*in.jsonl:1: a record needs"):
        build(work, tokenizer, [{"prompt": "a"}, "{"], on_bad=OnBad.skip)


def test_a_link_out_of_the_folders_is_followed_only_where_it_leads_into_another(work, tokenizer):
    store, pictures = work / "store", work / "pictures"
    store.mkdir()
    pictures.mkdir()
    (work / "a.png").rename(store / "blob")
    (pictures / "a.png").symlink_to(store / "blob")
    lines = write(work, [GOOD])
    with pytest.raises(DataError, match=rf"store/blob  -> .* --images {pictures} {store}; "):
        build_dataset([lines], work / "out", tokenizer, images=[pictures])
    build_dataset([lines], work / "out", tokenizer, images=[pictures, store])


def test_a_file_that_is_too_large_is_not_read(work, tokenizer, monkeypatch):
    monkeypatch.setattr(ImageKind, "max_bytes", 50)
    with pytest.raises(DataError, match=r"a.png has \d+ bytes, above the bound of 50"):
        build(work, tokenizer, [GOOD])


def test_an_existing_output_is_never_overwritten(work, tokenizer):
    (work / "out").mkdir()
    with pytest.raises(DataError, match="exists already"):
        build(work, tokenizer, [GOOD])


def test_webdataset_reads_the_shards(work, tokenizer):
    two = {"content": [IMAGE, CAPTION, {"type": "image", "image": "b.v2.JPG"}]}
    build(work, tokenizer, [GOOD, {"text": "no media"}, two, GOOD], shard_size=3500)
    shards = sorted((work / "out/shards").iterdir())
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar"]
    samples = list(webdataset.WebDataset([str(s) for s in shards], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000000", "000000002", "000000003"]
    png, jpg = ((work / name).read_bytes() for name in ("a.png", "b.v2.JPG"))
    assert samples[0]["png"] == samples[2]["png"] == samples[1]["0.png"] == png
    assert samples[1]["1.jpg"] == jpg
    assert json.loads(samples[1]["json"]) == two


def test_the_same_input_gives_the_same_bytes(work, tokenizer):
    lines = write(work, [GOOD, {"text": "words"}])
    for name in ("one", "two"):
        build_dataset([lines], work / name, tokenizer, images=[work])
    one, two = (Dataset.open(work / name, name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint


def test_file_urls_and_absolute_paths_are_paths(work, tokenizer):
    paths = [f"file://{work}/a.png", str(work / "a.png")]
    lines = [{"content": [{"type": "image", "image": path}, CAPTION]} for path in paths]
    assert build(work, tokenizer, lines).num_media == 2


def test_image_sizes_in_the_index_are_upright(work, tokenizer):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (50, 40)).save(work / "a.png", exif=exif)
    build(work, tokenizer, [GOOD])
    media = Dataset.open(work / "out", "out").sample(0).media[0]
    assert (media.width, media.height) == (40, 50)


def test_command_line(work, tokenizer_folder, capsys):
    lines = write(work, [GOOD, "{"])
    arguments = ["--input", str(lines), "--tokenizer", str(tokenizer_folder)]
    output = ["--output", str(work / "out")]
    with pytest.raises(DataError, match=r"in\.jsonl:2: not JSON"):
        prepare.main(arguments + output)
    prepare.main([*arguments, *output, "--on-bad", "skip"])
    assert "1 samples, 1 images" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        prepare.main([*arguments[:-1], str(work / "nowhere"), *output])


def test_help_imports_nothing_heavy():
    script = Path(prepare.__file__)
    code = (
        "import runpy, sys; sys.argv = ['prepare.py', '--help']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "--on-bad" in result.stdout
    assert result.stdout.endswith("[]\n")

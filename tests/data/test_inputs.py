"""Every input format gives the same samples as our own records, and refuses what does not fit."""

import io
import json
import re
import tarfile
from contextlib import nullcontext
from pathlib import Path

import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import parquet

from triptych.data.dataset.dataset import Dataset
from triptych.data.parts import MediaBytes
from triptych.data.prepare.build_block import OnBad, ReadingOptions
from triptych.data.prepare.build_dataset import BLOCK_SIZE, build_dataset
from triptych.data.prepare.inputs.readers import container_of, read_segments
from triptych.data.prepare.inputs.record_formats import convert
from triptych.data.prepare.spelled import special_in, with_places
from triptych.data.tokenizer import train_tokenizer
from triptych.errors import DataError
from triptych.launch import prepare
from triptych.tests.helpers.videos import video


def image(path: object = "a.png") -> dict[str, object]:
    return {"type": "image", "image": path}


def clip(path: object = "a.mp4") -> dict[str, object]:
    return {"type": "video", "video": path}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def turn(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


ASKED = [turn("user", "<image>What? <image>"), turn("assistant", "A cat.")]
ASKED_AS_PARTS = [turn("user", [image(), text("What? "), image("b.png")]), ASKED[1]]
TAP = '{"name": "tap", "arguments": {"x": 1}}'
CALL = {"type": "call", "name": "tap", "arguments": {"x": 1}}
RECORDS = {
    "ms-swift": ({"messages": ASKED, "images": ["a.png", "b.png"]}, {"messages": ASKED_AS_PARTS}),
    "ms-swift paths": (
        {"messages": ASKED, "images": [{"bytes": None, "path": "a.png"}, {"path": "b.png"}]},
        None,
    ),
    "ms-swift agent": (
        {
            "messages": [
                turn("user", "Go."),
                turn("assistant", "Hm."),
                turn("tool_call", TAP),
                turn("tool_call", TAP),
                turn("tool_response", "<image>"),
                turn("tool_response", "ok"),
                turn("assistant", "Done."),
            ],
            "images": ["a.png"],
        },
        {
            "messages": [
                turn("user", "Go."),
                turn("assistant", [text("Hm."), CALL, CALL]),
                turn("tool", [image()]),
                turn("tool", "ok"),
                turn("assistant", "Done."),
            ]
        },
    ),
    "ms-swift video": (
        {
            "messages": [turn("user", "<video><image>Is <video> like it?"), ASKED[1]],
            "images": ["a.png"],
            "videos": ["a.mp4", "b.mp4"],
        },
        {
            "messages": [
                turn("user", [clip(), image(), text("Is "), clip("b.mp4"), text(" like it?")]),
                ASKED[1],
            ]
        },
    ),
    "sharegpt video": (
        {
            "video": "a.mp4",
            "conversations": [said("human", "<video>\nWhat?"), said("gpt", "A cat.")],
        },
        {"messages": [turn("user", [clip(), text("\nWhat?")]), ASKED[1]]},
    ),
    "sharegpt": (
        {
            "id": "7",
            "image": "a.png",
            "conversations": [said("human", "<image>\nWhat?"), said("gpt", "A cat.")],
        },
        {
            "id": "7",
            "messages": [turn("user", [image(), text("\nWhat?")]), turn("assistant", "A cat.")],
        },
    ),
    "interleaved": (
        {"texts": ["One ", None, " two"], "images": [None, "a.png", None]},
        {"content": [text("One "), image(), text(" two")]},
    ),
    "interleaved video": (
        {
            "id": "7",
            "texts": [None, "One", None],
            "images": ["a.png", None, None],
            "videos": [None, None, "a.mp4"],
        },
        {"id": "7", "content": [image(), text("One"), clip()]},
    ),
    "interleaved video only": (
        {"texts": [None, "One"], "videos": [{"path": "a.mp4"}, None]},
        {"content": [clip(), text("One")]},
    ),
    "mmc4": (
        {
            "url": "http://a.example",
            "text_list": ["One.", "Two.", "Three."],
            "image_info": [
                {"image_name": "b.png", "raw_url": "http://b", "matched_text_index": 2},
                {"image_name": "a.png", "matched_text_index": 0, "matched_sim": 0.2},
                {"image_name": "c.png", "matched_text_index": 2, "face_detections": None},
            ],
            "similarity_matrix": [[0.1, 0.2, 0.3]] * 3,
        },
        {
            "content": [
                image(),
                text("One. "),
                text("Two. "),
                image("b.png"),
                image("c.png"),
                text("Three."),
            ]
        },
    ),
    "mmc4 other keys": (
        {"id": 3, "text_list": ["One."], "image_info": [], "could_have_url_duplicate": 0},
        {"id": 3, "content": [text("One.")]},
    ),
    "obelics": (
        {
            "texts": ["One ", None, " two"],
            "images": [None, "a.png", None],
            "metadata": json.dumps([None, {"src": "http://a"}, None]),
            "general_metadata": json.dumps({"url": "http://b"}),
        },
        {"content": [text("One "), image(), text(" two")]},
    ),
    "pair video": ({"video": "a.mp4", "text": "A cat."}, {"content": [clip(), text("A cat.")]}),
    "pair": ({"image": "a.png", "caption": "A cat."}, {"content": [image(), text("A cat.")]}),
    "triptych": ({"text": "plain", "id": 5}, {"text": "plain", "id": 5}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_recognised_and_made_ours(name):
    record, ours = RECORDS[name]
    assert convert(record, None, frozenset()) == (
        name.split()[0],
        ours or {"messages": ASKED_AS_PARTS},
    )
    assert convert(record, name.split()[0], frozenset()) == convert(record, None, frozenset())


BAD = {
    "one mark more": (
        {"messages": ASKED, "images": ["a.png"]},
        "ms-swift: 2 marks <image> in the text, 1 images beside it",
    ),
    "one mark less": (
        {"messages": ASKED, "images": ["a.png"] * 3},
        "2 marks <image> in the text, 3 images",
    ),
    "no mark": (
        {"image": "a.png", "conversations": [said("human", "What?"), said("gpt", "A cat.")]},
        "sharegpt: 0 marks <image> in the text, 1 images",
    ),
    "video for image": ({"messages": ASKED, "videos": ["a.mp4"]}, "2 marks <image>.* 0 images"),
    "human twice": (
        {"conversations": [said("human", "a"), said("human", "b")]},
        r"conversations\[1\] is from human, as is the one before",
    ),
    "gpt first": ({"conversations": [said("gpt", "a")]}, r"conversations\[0\] .* out of order"),
    "system late": (
        {"conversations": [said("human", "a"), said("system", "b")]},
        r"conversations\[1\] is from system: turns are out of order",
    ),
    "speaker": ({"conversations": [said("cat", "a")]}, "is from 'cat'; known are human"),
    "call": ({"messages": [turn("tool_call", "tap")]}, "must be JSON with name and arguments"),
    "lengths": ({"texts": ["a"], "images": []}, "lists of one length"),
    "none": ({"texts": ["a"], "image": "b.png"}, "lists of one length"),
    "both": (
        {"texts": ["a"], "images": ["b.png"], "videos": [None]},
        r"images\[0\], videos\[0\], texts\[0\]: all but one .* must be null; 2 are not",
    ),
    "nothing": ({"texts": [None], "videos": [None]}, "must be null; 0 are not"),
    "videos too short": (
        {"texts": ["a", None], "images": [None, "b.png"], "videos": []},
        "lists of one length",
    ),
    "beyond the sentences": (
        {"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
        r"mmc4: image_info\[0\].matched_text_index is 1; text_list has 1 sentences",
    ),
    "no sentence": (
        {"text_list": ["a"], "image_info": [{"image_name": "a.png"}]},
        "matched_text_index is None",
    ),
    "never saved": (
        {"text_list": ["a"], "image_info": [{"matched_text_index": 0}]},
        r"image_info\[0\] has no image_name",
    ),
    "a picture lost": (
        {"text_list": ["a"], "image_info": [], "similarity_matrix": [[0.5]]},
        "must have 0 rows, as image_info, .* it has 1 rows, of",
    ),
    "a sentence lost": (
        {
            "text_list": ["a"],
            "image_info": [{"image_name": "a.png", "matched_text_index": 0}],
            "similarity_matrix": [[0.5, 0.1]],
        },
        "of 1 numbers, as text_list; it has 1 rows, of",
    ),
    "sentences that are none": ({"text_list": "a", "image_info": []}, "a list of strings"),
    "pictures that are none": ({"text_list": ["a"], "image_info": ["b"]}, "a list of objects"),
    "obelics cut": (
        {"texts": ["a", None], "images": [None, "a.png"], "metadata": "[null]"},
        "obelics: metadata is of 1 places, texts of 2",
    ),
    "obelics garbled": (
        {"texts": ["a"], "images": [None], "metadata": "[nul"},
        "obelics: metadata is not JSON",
    ),
    "obelics lengths": (
        {"texts": ["a"], "images": [None, "a.png"], "general_metadata": "{}"},
        "obelics: texts, and images or videos, must be lists of one length",
    ),
    "two captions": ({"image": "a.png", "text": "a", "caption": "b"}, "one image or video and one"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_a_record_that_does_not_fit_its_format_is_refused(record, message):
    with pytest.raises(DataError, match=message):
        convert(record, None, frozenset())


def test_a_guess_can_be_overruled():
    record = {"messages": [turn("user", "a <image> tag"), ASKED[1]]}
    assert convert(record, None, frozenset()) == ("triptych", record)
    with pytest.raises(DataError, match="read as ms-swift: 1 marks <image> in the text, 0 images"):
        convert(record, "ms-swift", frozenset())


PLACES = {
    "<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>": [
        {"type": "ref", "text": "a"},
        {"type": "box", "box": [1, 2, 3, 4]},
    ],
    "See <ref>a</ref><box>(1,2), (3,4),(5,6),(7,8)</box>!": [
        text("See "),
        {"type": "ref", "text": "a"},
        {"type": "box", "box": [1, 2, 3, 4]},
        {"type": "box", "box": [5, 6, 7, 8]},
        text("!"),
    ],
    "<quad>(1,2),(3,4),(5,6),(7,8)</quad>": [{"type": "quad", "quad": [1, 2, 3, 4, 5, 6, 7, 8]}],
}


@pytest.mark.parametrize(("spelled", "parts"), PLACES.items())
def test_places_that_text_spells_out_become_parts(spelled, parts):
    assert with_places({"text": spelled}) == {"content": parts}
    assert with_places({"content": [image(), text(spelled)]})["content"] == [image(), *parts]
    chat = with_places({"messages": [turn("user", "a"), turn("assistant", spelled)]})
    assert chat == {"messages": [turn("user", "a"), turn("assistant", parts)]}


@pytest.mark.parametrize("spelled", ["<ref>a", "a<|box_end|>", "<box>left</box>", "</quad>"])
def test_places_that_are_none_are_refused(spelled):
    with pytest.raises(DataError, match=r"alone|spells no"):
        with_places({"text": spelled})


def test_special_tokens_in_text_are_found():
    record = {
        "messages": [turn("user", "a <|im_end|>"), turn("assistant", [text("<|box_start|>")])]
    }
    assert special_in(record) == {"<|im_end|>", "<|box_start|>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["A cat."], tmp_path_factory.mktemp("tokenizer"), 280)


@pytest.fixture
def work(tmp_path):
    for name, shade in (("a.png", 10), ("b.png", 99)):
        Image.new("L", (50, 40), shade).save(tmp_path / name)
    return tmp_path


def read_file(path: Path):
    return read_segments(container_of(path).split(path, BLOCK_SIZE))


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_tar(path: Path, work: Path) -> Path:
    pictures = [(work / name).read_bytes() for name in ("a.png", "b.png")]
    caption = json.dumps({"caption": "A cat."}).encode()
    members = {"x/0.png": pictures[0], "x/0.txt": b"A cat.", "x/0.json": b"{}"}
    return shard(path, members | {"x/1.2.png": pictures[1], "x/1.json": caption})


def write_parquet(path: Path, work: Path) -> Path:
    rows = [{"bytes": (work / name).read_bytes(), "path": name} for name in ("a.png", "b.png")]
    parquet.write_table(arrow.table({"image": rows, "text": ["A cat.", "A cat."]}), path)
    return path


def write_array(path: Path, work: Path) -> Path:
    pairs = [{"image": name, "text": "A cat."} for name in ("a.png", "b.png")]
    path.write_text(json.dumps(pairs, indent=2))
    return path


def write_lines(path: Path, work: Path) -> Path:
    path.write_text("".join(f'{{"image": "{n}", "text": "A cat."}}\n' for n in ("a.png", "b.png")))
    return path


CONTAINERS = {
    "webdataset": write_tar,
    "Parquet": write_parquet,
    "JSON array": write_array,
    "JSONL": write_lines,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_samples(work, tokenizer, name):
    file = CONTAINERS[name](work / "in", work)
    assert container_of(file).name == name
    before = file.read_bytes()
    build_dataset([file], work / "out", tokenizer, images=[work])
    dataset = Dataset.open(work / "out", "out")
    assert len(dataset) == 2
    for i, picture in enumerate(("a.png", "b.png")):
        sample = dataset.sample(i)
        (media,) = sample.media
        assert dataset.read_media(media) == (work / picture).read_bytes()
        assert tokenizer.decode(sample.input_ids.tolist()).endswith("A cat.<|endoftext|>")
    assert file.read_bytes() == before


def test_a_video_comes_by_any_format_and_container(work, tokenizer):
    content = video(4)
    (work / "a.mp4").write_bytes(content)
    chat = [turn("user", "<video>What?"), turn("assistant", "A cat.")]
    records = [
        {"messages": chat, "videos": ["a.mp4"]},
        {"texts": [None, "A cat."], "images": [None, None], "videos": ["a.mp4", None]},
        {"video": "a.mp4", "conversations": [said("human", "<video>?"), said("gpt", "A cat.")]},
    ]
    lines = work / "in.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = work / "in.parquet"
    pairs = {"video": [{"bytes": content, "path": "a.mp4"}], "caption": ["A cat."]}
    parquet.write_table(arrow.table(pairs), rows)
    tar = shard(work / "in.tar", {"0.mp4": content, "0.txt": b"A cat."})
    build_dataset([lines, rows, tar], work / "out", tokenizer, images=[work])
    dataset = Dataset.open(work / "out", "out")
    assert len(dataset) == 5
    for sample in map(dataset.sample, range(5)):
        (media,) = sample.media
        assert (media.kind, media.frames, dataset.read_media(media)) == (1, 4, content)
        assert tokenizer.decode(sample.input_ids.tolist()).count("<|video_pad|>") == 1


def test_shards_are_indexed_where_they_lie(work, tokenizer):
    file = write_tar(work / "in.tar", work)
    build_dataset([file], work / "out", tokenizer, images=[work])
    assert not list((work / "out/shards").iterdir())
    dataset = Dataset.open(work / "out", "out")
    assert dataset.manifest.shards_elsewhere == {str(file): file.stat().st_size}
    media = dataset.sample(0).media[0]
    content = bytearray(file.read_bytes())
    content[media.offset + 9] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"of {file} is damaged"):
        dataset.read_media(media)
    file.write_bytes(content[:-512])
    with pytest.raises(DataError, match=r"in\.tar has \d+ bytes"):
        Dataset.open(work / "out", "out")


def cut(content: bytes) -> dict[str, bytes]:
    """The same shard, damaged."""
    second = content.index(b"x/1.2.png")
    flipped = content[: second + 150] + b"9" + content[second + 151 :]
    return {
        "within a member": content[: second + 600],
        "a header": flipped,
        "the end": content[:second],
    }


@pytest.mark.parametrize("damage", ["within a member", "a header", "the end"])
def test_a_damaged_shard_loses_no_sample_in_silence(work, damage):
    file = write_tar(work / "in.tar", work)
    file.write_bytes(cut(file.read_bytes())[damage])
    with pytest.raises(DataError, match=r"in\.tar (is cut within|is damaged at|cannot be read)"):
        list(read_file(file))


MEMBERS = {
    "missing": ({"0.png": b"x"}, "0 has no caption"),
    "no picture": ({"0.txt": b"x"}, "0 has 0 images or videos"),
    "two pictures": ({"0.a.png": b"x", "0.b.png": b"x"}, "0 has 2 images or videos"),
    "unknown": ({"0.png": b"x", "0.txt": b"a", "0.npy": b""}, "0 has npy besides"),
    "no text": ({"0.png": b"x", "0.txt": b"\xff"}, "0.txt is not UTF-8"),
}


@pytest.mark.parametrize(("members", "message"), MEMBERS.values(), ids=MEMBERS)
def test_members_that_are_no_pair_are_a_bad_sample(work, members, message):
    (raw,) = read_file(shard(work / "in.tar", members))
    with pytest.raises(DataError, match=message):
        raw.read()


@pytest.mark.parametrize(
    ("names", "messages"),
    [
        (["0.png", "0.txt", "0.png"], ["0 has two members of the same name"]),
        (["0.png", "0.txt", "1.txt", "0.png", "0.txt"], [None, "1 has 0", "0 stands .* second"]),
        (["0.png", "1.png", "0.txt"], ["0 has no cap", "1 has no cap", "0 stands .* apart from"]),
    ],
    ids=["member", "sample", "apart"],
)
def test_what_stands_twice_in_a_shard_is_a_bad_sample(work, names, messages):
    content = {"png": (work / "a.png").read_bytes(), "txt": b"a"}
    with tarfile.open(work / "in.tar", "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content[name[2:]])
            archive.addfile(member, io.BytesIO(content[name[2:]]))
    for raw, message in zip(read_file(work / "in.tar"), messages, strict=True):
        expected = pytest.raises(DataError, match=message) if message else nullcontext()
        with expected:
            raw.read()


def test_an_empty_member_is_a_bad_sample(work, tokenizer):
    members = {"0.png": b"", "0.txt": b"a", "1.png": (work / "a.png").read_bytes(), "1.txt": b"b"}
    file = shard(work / "in.tar", members)
    manifest = build_dataset([file], work / "out", tokenizer, images=[work], on_bad=OnBad.skip)
    assert (manifest.num_samples, manifest.num_skipped) == (1, 1)


def test_a_column_of_another_type_is_named(work):
    table = arrow.table({"image": [5], "text": [7], "messages": ["a"], "id": [3]})
    parquet.write_table(table, work / "in")
    message = "column image is of type int64.* column text is of type int64, not string; column me"
    with pytest.raises(DataError, match=message):
        list(read_file(work / "in"))


def test_rows_may_hold_chats_and_lists_of_pictures(work):
    picture = {"bytes": b"x", "path": None}
    table = {"messages": [ASKED], "images": [[picture, {"bytes": None, "path": "b.png"}]]}
    parquet.write_table(arrow.table(table), work / "in")
    (raw,) = read_file(work / "in")
    name, record = convert(raw.read(), None, frozenset())
    assert name == "ms-swift"
    parts = record["messages"][0]["content"]
    assert [part.get("image") for part in parts] == [MediaBytes("", b"x"), None, "b.png"]
    assert "b.png" in raw.shown().decode()


def test_a_damaged_parquet_file_is_named(work):
    file = write_parquet(work / "in", work)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(read_file(file))


def test_a_long_array_is_read_in_pieces(work):
    records = [{"text": f"{i} " * 5000} for i in range(300)]
    (work / "in").write_text(json.dumps(records))
    assert [raw.read() for raw in read_file(work / "in")] == records
    (work / "in").write_text(json.dumps(records)[:-9])
    with pytest.raises(DataError, match="element 300 of the array is not JSON"):
        list(read_file(work / "in"))


def test_the_report_says_what_was_read(work, tokenizer, capsys):
    lines = [
        {"messages": ASKED, "images": ["a.png", "b.png"]},
        {"messages": ASKED, "images": ["a.png"]},
        {"text": "<|box_start|>(1,2),(3,4)<|box_end|>"},
        {"text": "A cat. <|im_end|>"},
    ]
    (work / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = work / "tokenizer"
    train_tokenizer(["A cat."], folder, 280)
    arguments = ["--input", f"{work}/in.jsonl", "--tokenizer", f"{folder}", "--on-bad", "skip"]
    prepare.main([*arguments, "--output", f"{work}/out"])
    told = capsys.readouterr().out
    assert "read as triptych (2), ms-swift (1)" in told
    assert re.search(r"1 samples of chat, images: \d+ text tokens", told)
    assert "1 left out: read as ms-swift: … marks <image> in the text, … images beside it" in told
    assert "<|box_start|> (1)" in told
    assert "-> --parse-grounding makes places of them" in told
    prepare.main([*arguments, "--output", f"{work}/parsed", "--parse-grounding"])
    assert "<|box_start|> (1)" not in capsys.readouterr().out
    dataset = Dataset.open(work / "parsed", "parsed")
    assert dataset.sample(1).input_ids[0] == tokenizer.special("box_start")
    report = json.loads((work / "parsed/report.json").read_text())
    assert report["reading"]["parse_grounding"] is True
    assert report["samples"] == {"document, text only": 2, "chat, images": 1}
    dataset.verify()


def test_reading_decides_how_a_line_end_counts(work, tokenizer):
    record = {"messages": [turn("user", "A"), turn("assistant", "cat")]}
    (work / "in.jsonl").write_text(json.dumps(record))
    for name, reading in (
        ("no", ReadingOptions()),
        ("yes", ReadingOptions(line_end_is_target=True)),
    ):
        build_dataset([work / "in.jsonl"], work / name, tokenizer, images=[work], reading=reading)
    counts = [Dataset.open(work / name, name).manifest.num_targets for name in ("no", "yes")]
    assert counts[1] == counts[0] + 1


def test_published_documents_are_prepared_and_said(work, tokenizer, capsys):
    """OBELICS as its Parquet files are, MMC4 as its lines are."""
    rows, lines = work / "obelics.parquet", work / "mmc4.jsonl"
    columns = {
        "images": [[None, "a.png"], ["a.png", None, "b.png"]],
        "metadata": ["[null, {}]", "[{}, null, {}]"],
        "general_metadata": ["{}", "{}"],
        "texts": [["One.", None], [None, "Two.", None]],
    }
    parquet.write_table(arrow.table(columns), rows)
    pictures = [{"image_name": f"{name}.png", "matched_text_index": 1} for name in "ab"]
    lines.write_text(json.dumps({"text_list": ["One.", "Two."], "image_info": pictures}) + "\n")
    tokenizer_folder = work / "tokenizer"
    train_tokenizer(["some words"], tokenizer_folder, 300)
    words = ["--input", rows, lines, "--images", work, "--tokenizer", tokenizer_folder]
    prepare.main([str(word) for word in [*words, "--output", work / "out"]])
    assert "read as obelics (2), mmc4 (1)" in capsys.readouterr().out
    dataset = Dataset.open(work / "out", "out")
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    decoded = [tokenizer.decode(dataset.sample(i).input_ids.tolist()) for i in range(3)]
    expected = [f"One.{shown}", f"{shown}Two.{shown}", f"One. {shown}{shown}Two."]
    assert decoded == [f"{text}<|endoftext|>" for text in expected]

"""Pictures in every object storage, compared with the index as they are read."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from triptych.data.dataset.dataset import Dataset
from triptych.data.loading.joined_media import JoinedMedia
from triptych.data.prepare.build_dataset import build_dataset
from triptych.data.stores import request_rate
from triptych.data.stores.cloud import SCHEMES
from triptych.data.stores.media_store import open_store
from triptych.data.tokenizer import train_tokenizer
from triptych.errors import DataError
from triptych.launch.prepare import main
from triptych.tests.helpers import cloud_server, oss_server

PLACE = "bucket/mine"


@pytest.fixture(params=["oss", *SCHEMES])
def scheme(request) -> str:
    if request.param != "oss":
        pytest.importorskip("obstore", reason="the extra cloud is not installed")
    return request.param


@pytest.fixture
def server(scheme, monkeypatch, tmp_path):
    """Its keys are in the environment."""
    for name in cloud_server.keys_of_this_machine():
        monkeypatch.delenv(name)
    monkeypatch.setattr(request_rate.tempfile, "gettempdir", lambda: str(tmp_path))
    with oss_server.serving() if scheme == "oss" else cloud_server.serving(scheme) as server:
        if scheme == "oss":
            keys = oss_server.environment(server.endpoint)
        else:
            keys = cloud_server.environment(scheme, server.endpoint, tmp_path)
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = train_tokenizer(["some words"], folder / "tokenizer", 300)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(
        folder / "a.png"
    )
    image, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "noise"}
    lines = [json.dumps({"content": content}) for content in ([image, text], [*[image] * 3, text])]
    (folder / "in.jsonl").write_text("\n".join(lines))
    build_dataset([folder / "in.jsonl"], folder / "set", tokenizer, images=[folder])
    return folder / "set"


def test_pictures_side_by_side_are_one_request(prepared, scheme, server):
    """One that is damaged on its way is asked for alone."""
    content = (prepared / "shards/000000.tar").read_bytes()
    server.objects[f"{PLACE}/000000.tar"] = content
    dataset = Dataset.open(prepared, "mine", store=open_store(f"{scheme}://{PLACE}", 1000))
    media = dataset.sample(1).media
    wanted = [content[item.offset : item.offset + item.size] for item in media]

    def read():
        server.asked.clear()
        joined = JoinedMedia(dataset, media)
        return [joined.read(number) for number in range(3)]

    assert read() == wanted
    assert len(server.asked) == 1
    server.faults.append(lambda h: h.answer(lambda b: bytes([b[0] ^ 1]) + b[1:]))
    assert read() == wanted
    assert server.asked[1:] == [f"bytes={media[0].offset}-{media[0].offset + media[0].size - 1}"]


def test_every_range_is_compared_with_the_index(prepared, scheme, server, tmp_path, capsys):
    """A bit that flips on its way is asked for again; one that stays is a damaged image."""
    shutil.copytree(prepared, tmp_path / "set")
    shard = tmp_path / "set/shards/000000.tar"
    content = shard.read_bytes()
    server.objects[f"{PLACE}/000000.tar"] = content
    shutil.rmtree(shard.parent)
    dataset = Dataset.open(tmp_path / "set", "mine", store=open_store(f"{scheme}://{PLACE}", 1000))
    [media] = dataset.sample(0).media
    wanted = content[media.offset : media.offset + media.size]
    flipped = bytearray(content)
    flipped[media.offset + 7] ^= 1

    def on_its_way(handler):
        return handler.answer(lambda b: bytes([b[0] ^ 1]) + b[1:])

    server.faults.append(on_its_way)
    assert dataset.read_media(media) == wanted
    main(["verify", str(tmp_path / "set"), "--shards", f"{scheme}://{PLACE}"])
    assert "all 5 files are as they were prepared" in capsys.readouterr().out
    server.objects[f"{PLACE}/000000.tar"] = bytes(flipped)
    with pytest.raises(DataError, match="is damaged: its xxh3-128"):
        dataset.read_media(media)
    with pytest.raises(DataError, match=r"000000\.tar is damaged"):
        main(["verify", str(tmp_path / "set"), "--shards", f"{scheme}://{PLACE}"])

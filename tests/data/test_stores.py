"""Which places media are read from, and which are refused."""

import pytest

from triptych.data.stores.media_store import open_store
from triptych.errors import ConfigError, DataError


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "my shards"
    folder.mkdir()
    (folder / "000000.tar").write_bytes(bytes(range(100)))
    return folder


def test_a_path_and_its_file_url_are_the_same_place(shards):
    for url in (str(shards), shards.as_uri(), f"file://localhost{shards}"):
        assert open_store(url).read("000000.tar", 10, 3) == bytes([10, 11, 12])


def test_a_file_that_ends_before_is_refused_at_once(shards):
    with pytest.raises(DataError, match="ends at byte 100, before the 3 bytes from 98 on"):
        open_store(str(shards)).read("000000.tar", 98, 3)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "ftp://server/shards",
            r"ftp:// is no place .* and file://, oss://, s3://, gs://, az://  -> copy",
        ),
        ("file://server/shards", "names a file on the host server"),
    ],
)
def test_a_place_that_is_not_known_is_refused(url, message):
    with pytest.raises(ConfigError, match=message):
        open_store(url)

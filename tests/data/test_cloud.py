"""S3, Google Cloud Storage and Azure by obstore's own clients, against servers on the loopback."""

import sys

import numpy as np
import pytest

from triptych.data.stores import cloud, request_rate
from triptych.data.stores.media_store import open_store
from triptych.errors import ConfigError, DataError, StorageError
from triptych.tests.helpers.cloud_server import (
    TOKEN,
    azure_sas,
    environment,
    keys_of_this_machine,
    new_google_key,
    serving,
    write_service_account,
)
from triptych.tests.helpers.object_server import SECRET

CONTENT = np.random.default_rng(0).bytes(300_000)
FOLDER = "bucket/some shards"
NAME = f"{FOLDER}/000000.tar"
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def no_keys(monkeypatch, tmp_path):
    """Those of this machine are no test's; waits are short."""
    pytest.importorskip("obstore", reason="the extra cloud is not installed")
    for name in keys_of_this_machine():
        monkeypatch.delenv(name)
    monkeypatch.setattr(request_rate.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cloud, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(cloud, "MOST_TRIES", 3)


@pytest.fixture(params=cloud.SCHEMES)
def scheme(request) -> str:
    return request.param


@pytest.fixture
def server(scheme, no_keys, monkeypatch, tmp_path):
    """One that has an object; its keys are in the environment."""
    with serving(scheme) as server:
        server.objects[NAME] = CONTENT
        export(monkeypatch, environment(scheme, server.endpoint, tmp_path))
        yield server


def export(monkeypatch, variables: dict[str, str | None]) -> None:
    """None is one that is not set."""
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def read(scheme, offset=1000, size=200_000, name="000000.tar") -> bytes:
    return open_store(f"{scheme}://{FOLDER}", 1000).read(name, offset, size)


def half(body: bytes) -> bytes:
    return body[: len(body) // 2]


def busy(handler) -> bool:
    handler.refuse(503, "SlowDown")
    return True


def reset(handler) -> bool:
    handler.reset()
    return True


def test_ranges_are_read(scheme, server):
    assert read(scheme) == CONTENT[1000:201_000]
    assert read(scheme, 299_999, 1) == CONTENT[-1:]
    assert read(scheme, 0, 300_000) == CONTENT
    assert server.asked == ["bytes=1000-200999", "bytes=299999-299999", "bytes=0-299999"]


@pytest.mark.parametrize(
    ("faults", "starts"),
    [
        ([busy], [1000, 1000]),
        ([busy, reset, busy], [1000] * 4),
        ([lambda h: h.answer(half)], [1000, 101_000]),
        ([lambda h: h.answer(half) and reset(h)], [1000, 101_000]),
    ],
    ids=["503", "503 and resets", "short", "broken off"],
)
def test_what_may_pass_is_tried_again_from_where_it_ended(faults, starts, scheme, server):
    server.faults.extend(faults)
    assert read(scheme) == CONTENT[1000:201_000]
    assert [int(asked[6:].split("-")[0]) for asked in server.asked] == starts


@pytest.mark.parametrize(
    ("offset", "size"),
    [(299_990, 100), (400_000, 100)],
    ids=["across the end", "behind the end"],
)
def test_an_object_that_was_cut_is_told(offset, size, scheme, server):
    told = f"ends before the {size} bytes from {offset} on: it was cut"
    with pytest.raises(DataError, match=f"^{scheme}://{NAME} {told}  -> copy it again"):
        read(scheme, offset, size)


def test_an_object_that_is_replaced_while_it_is_read_is_told(scheme, server):
    """The rest of another version is never put behind what was read."""
    server.faults.append(
        lambda h: h.answer(half) and (server.objects.update({NAME: CONTENT[::-1]}) or True)
    )
    with pytest.raises(DataError, match=f"^{scheme}://{NAME} was replaced while it was read  -> "):
        read(scheme)


def test_a_missing_object_is_told_by_name(scheme, server):
    told = r"cannot be read: 404 Not Found \(\w+\)  -> copy the shard there"
    with pytest.raises(StorageError, match=f"^{scheme}://{FOLDER}/000009.tar {told}"):
        read(scheme, name="000009.tar")


@pytest.mark.parametrize(
    ("faults", "num_asked", "told"),
    [
        ([busy] * 8, 4, r"503 Service Unavailable \(SlowDown\)  -> bring it back"),
        ([reset] * 8, 4, ".*error sending request  -> bring it back"),
        (
            [lambda h: h.refuse(403, "AccessDenied") or True],
            1,
            r"403 Forbidden \(AccessDenied\)  -> docs/object-storage.md has the keys",
        ),
    ],
    ids=["503", "resets", "403"],
)
def test_what_does_not_pass_is_told_without_secrets(faults, num_asked, told, scheme, server):
    """The servers' messages have them, and ours is one line. Nobody is asked beyond the tries."""
    server.faults.extend(faults)
    with pytest.raises(StorageError, match=f"^{scheme}://{NAME} cannot be read: {told}") as caught:
        read(scheme)
    assert len(server.asked) == num_asked
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


NO_ACCOUNT = {"GCE_METADATA_HOST": NOWHERE, "GCE_METADATA_IP": NOWHERE}
WRONG_KEYS = {
    "s3 key": ({"AWS_ACCESS_KEY_ID": "x"}, r"403 Forbidden \(InvalidAccessKeyId\)"),
    "s3 secret": ({"AWS_SECRET_ACCESS_KEY": "x"}, r"403 Forbidden \(SignatureDoesNotMatch\)"),
    "s3 token": ({"AWS_SESSION_TOKEN": "old"}, r"400 Bad Request \(ExpiredToken\)"),
    "s3 none": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
        | {"AWS_METADATA_ENDPOINT": f"http://{NOWHERE}"},
        "Generic S3 error: Error performing PUT http://127.0.0.1:1/latest/api/token",
    ),
    "gs key": ({"GOOGLE_SERVICE_ACCOUNT": "other.json"}, r"401 Unauthorized \(AuthenticationReq"),
    "gs none": ({"GOOGLE_SERVICE_ACCOUNT": None, **NO_ACCOUNT}, "Generic GCS error: .* token req"),
    "az key": ({"AZURE_STORAGE_ACCOUNT_KEY": "a2V5"}, r"403 Forbidden \(AuthenticationFailed\)"),
    "az SAS": (
        {"AZURE_STORAGE_ACCOUNT_KEY": None}
        | {"AZURE_STORAGE_SAS_TOKEN": azure_sas("bucket", "2020-01-01T00:00:00Z")},
        r"403 Forbidden \(AuthenticationFailed\)",
    ),
    "az none": (
        {"AZURE_STORAGE_ACCOUNT_KEY": None, "AZURE_MSI_ENDPOINT": f"http://{NOWHERE}/token"},
        "Generic MicrosoftAzure error: .* token request",
    ),
}


@pytest.mark.parametrize("case", WRONG_KEYS)
def test_wrong_keys_are_refused_at_once(case, no_keys, monkeypatch, tmp_path):
    scheme, (changes, told) = case[:2], WRONG_KEYS[case]
    write_service_account(tmp_path / "other.json", new_google_key())
    monkeypatch.chdir(tmp_path)
    with serving(scheme) as server:
        export(monkeypatch, environment(scheme, server.endpoint, tmp_path) | changes)
        told = f"^{scheme}://{NAME} cannot be read: {told}.*  -> docs/object-storage.md has the"
        with pytest.raises(StorageError, match=told) as caught:
            read(scheme)
        assert len(server.asked) <= 1
    assert SECRET not in str(caught.value)


OTHER_KEYS = {
    "s3 temporary keys": lambda _: {"AWS_SESSION_TOKEN": TOKEN},
    "gs account of the machine": lambda at: {
        "GOOGLE_SERVICE_ACCOUNT": None,
        "GCE_METADATA_HOST": at.removeprefix("http://"),
    },
    "az SAS": lambda _: {
        "AZURE_STORAGE_ACCOUNT_KEY": None,
        "AZURE_STORAGE_SAS_TOKEN": azure_sas("bucket"),
    },
    "az account of the machine": lambda at: {
        "AZURE_STORAGE_ACCOUNT_KEY": None,
        "AZURE_MSI_ENDPOINT": f"{at}/metadata/identity/oauth2/token",
    },
}


@pytest.mark.parametrize("case", OTHER_KEYS)
def test_there_are_other_keys_to_read_with(case, no_keys, monkeypatch, tmp_path):
    scheme = case[:2]
    with serving(scheme) as server:
        server.objects[NAME] = CONTENT
        changes = OTHER_KEYS[case](server.endpoint)
        export(monkeypatch, environment(scheme, server.endpoint, tmp_path) | changes)
        assert read(scheme) == CONTENT[1000:201_000]


def test_without_obstore_the_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(ConfigError, match=r"  -> pip install 'triptych\[cloud\]'"):
        open_store("gs://bucket/prefix")


@pytest.mark.parametrize(
    ("url", "keys", "told"),
    [
        ("az://container/p", {}, ".*Account "),
        ("az://container/p", {"AZURE_STORAGE_ACCOUNT_KEY": "no base64!"}, ".*Invalid Access Key"),
        ("s3://bucket/p", {"AWS_ACCESS_KEY_ID": "key"}, ".*Missing SecretAccessKey"),
        ("gs://bucket/p", {"GOOGLE_SERVICE_ACCOUNT": "missing.json"}, ".*from missing.json"),
    ],
)
def test_an_environment_that_cannot_do_is_refused_on_opening(url, keys, told, no_keys, monkeypatch):
    if "AZURE_STORAGE_ACCOUNT_KEY" in keys:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    export(monkeypatch, keys)
    with pytest.raises(ConfigError, match=f"^{url} cannot be read: {told}.*  -> docs/object-stor"):
        open_store(url)

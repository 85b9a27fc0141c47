"""S3, Google Cloud Storage and Azure by obstore: its own client of S3, against a small server."""

import sys
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from triptych.data.stores import cloud, request_rate
from triptych.data.stores.media_store import open_store
from triptych.errors import ConfigError, DataError, StorageError

CONTENT = np.random.default_rng(0).bytes(10_000)
SECRET = "secret-for-tests"
FAULTS: deque[int] = deque()
"""Status of the next answers."""


class _S3Handler(BaseHTTPRequestHandler):
    """S3 as far as ranges and sizes of one object go; signatures are not checked."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        status, body = FAULTS.popleft() if FAULTS else 0, b"<Error><Code>Code</Code></Error>"
        found = self.path == "/bucket/some/000000.tar"
        first, last = 0, len(CONTENT) - 1
        if "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        if not status:
            status = 404 if not found else 416 if first >= len(CONTENT) else 206
        if status == 206:
            body = CONTENT[first : last + 1]
        self.send_response(status if self.command == "GET" or status != 206 else 200)
        self.send_header("ETag", '"v1"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        if status == 206 and self.command == "GET":
            end = min(last, len(CONTENT) - 1)
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def store(monkeypatch, tmp_path):
    """Of S3, at a server on the loopback; waits are short."""
    pytest.importorskip("obstore", reason="the extra cloud is not installed")
    monkeypatch.setattr(request_rate.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cloud, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(cloud, "MOST_TRIES", 3)
    FAULTS.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _S3Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        environment = {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        environment |= {"REGION": "eu-west-1", "ACCESS_KEY_ID": "key"}
        for name, value in (environment | {"SECRET_ACCESS_KEY": SECRET}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield open_store("s3://bucket/some", 1000)
        server.shutdown()


@pytest.mark.parametrize("faults", [[], [503], [500, 503, 503]])
def test_ranges_are_read_and_what_may_pass_is_tried_again(faults, store):
    FAULTS.extend(faults)
    assert store.read("000000.tar", 1000, 5000) == CONTENT[1000:6000]
    assert store.read("000000.tar", 9999, 1) == CONTENT[-1:]
    assert not FAULTS


@pytest.mark.parametrize(
    ("name", "offset", "faults", "error", "told"),
    [
        ("000000.tar", 9_990, [], DataError, "ends before the 100 bytes from 9990 on: it was cut"),
        ("000000.tar", 20_000, [], DataError, "ends before the 100 bytes from 20000 on"),
        ("000009.tar", 0, [], StorageError, "cannot be read: .*  -> copy the shard there"),
        ("000000.tar", 0, [403], StorageError, "cannot be read: .*  -> docs/object-storage"),
        ("000000.tar", 0, [503] * 8, StorageError, "cannot be read: .*  -> bring it back"),
    ],
)
def test_what_does_not_pass_is_told_by_name(name, offset, faults, error, told, store):
    FAULTS.extend(faults)
    with pytest.raises(error, match=f"^s3://bucket/some/{name} {told}") as caught:
        store.read(name, offset, 100)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_obstore_the_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(ConfigError, match=r"  -> pip install 'triptych\[cloud\]'"):
        open_store("gs://bucket/prefix")


def test_azure_needs_its_account(monkeypatch):
    pytest.importorskip("obstore", reason="the extra cloud is not installed")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match=r"^az://container/p cannot .*Account .*  -> docs"):
        open_store("az://container/p")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    assert open_store("az://container/p").path("0.tar") == "az://container/p/0.tar"

"""A server on the loopback that answers GET and HEAD of objects, their ranges, and injects faults.

Who may ask, and by what names errors go, is a matter of the storage it stands for: a subclass of
``ObjectHandler`` (``oss_server``, ``cloud_server``).
"""

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

SECRET = "secret-for-tests"
MAX_SKEW_S = 15 * 60
"""Of clocks, where a request is signed with its time."""


class ObjectServer(ThreadingHTTPServer):
    """Objects by bucket/key, what to do wrong, and what was asked."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, handler: "type[ObjectHandler]") -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.objects: dict[str, bytes] = {}
        self.faults: deque[Callable[[ObjectHandler], object]] = deque()
        """Each is taken by one GET, the first first; it returns None to be no answer."""
        self.asked: list[str] = []
        """The range of every GET; HEAD has none."""
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def running(server: ObjectServer) -> Iterator[None]:
    """It answers until the end of the block."""
    with server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield
        server.shutdown()


class ObjectHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits 40 ms for the client to acknowledge its head
    server: ObjectServer
    no_such_object = "NoSuchKey"
    every_answer_has: ClassVar[dict[str, str]] = {}

    def problem(self) -> tuple[int, str] | None:
        """Status and code, where whoever asks may not."""
        raise NotImplementedError

    def account_token(self) -> dict[str, object] | None:
        """What the metadata of a machine with an account answer, where they are asked."""

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        server = self.server
        if token := self.account_token():
            self._send_json(token)
            return
        with server.lock:
            server.asked.append(self.headers.get("Range", ""))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if problem := self.problem():
                self.refuse(*problem)
                return
            with server.lock:
                fault = server.faults.popleft() if server.faults else None
            if fault is None or fault(self) is None:
                self.answer()

    def do_HEAD(self) -> None:
        with self.server.lock:
            self.server.asked.append("")
        content = self._content()
        if problem := self.problem():
            self.refuse(*problem)
        elif content is None:
            self.refuse(404, self.no_such_object)
        else:
            self._begin(200, content, len(content))
            self.end_headers()

    def refuse(self, status: int, code: str, **headers: str) -> None:
        told = f"<Error><Code>{code}</Code>\n<Message>{SECRET}</Message></Error>"
        body = f'<?xml version="1.0" encoding="utf-8"?>\n{told}'.encode()
        self.send_response(status)
        for name, value in {**self.every_answer_has, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reset(self) -> None:
        """End the connection as a broken network does."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def answer(
        self, change: Callable[[bytes], bytes] = bytes, pauses: tuple[float, ...] = ()
    ) -> bool:
        """The object's range; its bytes changed, or sent in parts with a pause before each."""
        content = self._content()
        if content is None:
            self.refuse(404, self.no_such_object)
            return True
        if self.headers.get("If-Match", _version(content)) != _version(content):
            self.refuse(412, "PreconditionFailed")
            return True
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = content[first : last + 1]
        if not body:
            self.refuse(416, "InvalidRange")
            return True
        self._begin(206, content, len(body))
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
        self.end_headers()
        sent = change(body)
        step = -(-len(sent) // max(1, len(pauses)))
        for number, pause_s in enumerate(pauses or (0.0,)):
            time.sleep(pause_s)
            self.wfile.write(sent[number * step : (number + 1) * step])
        if len(sent) < len(body):
            self.close_connection = True
        return True

    def _send_json(self, told: dict[str, object]) -> None:
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _content(self) -> bytes | None:
        return self.server.objects.get(unquote(urlsplit(self.path).path).lstrip("/"))

    def _begin(self, status: int, content: bytes, size: int) -> None:
        self.send_response(status)
        for name, value in self.every_answer_has.items():
            self.send_header(name, value)
        self.send_header("ETag", _version(content))
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.send_header("Content-Length", str(size))


def _version(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'

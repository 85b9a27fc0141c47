"""A server on the loopback that speaks OSS as far as GET goes: signatures, ranges, limits, faults.

Written from the protocol and beside oss2, so what it proves is that the two agree; no server of
Alibaba's has been asked.
"""

import base64
import contextlib
import hashlib
import hmac
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

KEY, SECRET, TOKEN = "AKID-for-tests", "secret-for-tests", "token-for-tests"
REGION = "cn-hangzhou"
MAX_SKEW_S = 15 * 60


class OssServer(ThreadingHTTPServer):
    """Objects by bucket/key, what to do wrong, and what was asked."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.faults: deque[Callable[[_Handler], object]] = deque()
        """Each is taken by one GET, the first first; it returns None to be no answer."""
        self.asked: list[str] = []
        """The range of every request."""
        self.per_second: int | None = None
        self.clock_s = 0.0
        """What the server's clock is ahead."""
        self.token_is_valid = True
        self.token: str | None = None
        """The only one that is valid, where it is given."""
        self.lock = threading.Lock()
        self._recent: deque[float] = deque()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def is_over_limit(self) -> bool:
        """Counts a request."""
        now = time.monotonic()
        while self._recent and self._recent[0] < now - 1:
            self._recent.popleft()
        if self.per_second is None or len(self._recent) < self.per_second:
            self._recent.append(now)
            return False
        return True


@contextlib.contextmanager
def serving() -> Iterator[OssServer]:
    """A server, until the end of the block."""
    with OssServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OssServer

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def refuse(self, status: int, code: str, **headers: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        self.send_response(status)
        for name, value in {"x-oss-request-id": "R1", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def reset(self) -> None:
        """End the connection as a broken network does."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def do_GET(self) -> None:
        server, name = self.server, unquote(urlsplit(self.path).path).lstrip("/")
        with server.lock:
            server.asked.append(self.headers.get("Range", ""))
            over = server.is_over_limit()
            fault = server.faults.popleft() if server.faults and not over else None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if over:
                self.refuse(503, "TotalQpsLimitExceeded")
            elif problem := self._problem():
                self.refuse(403, problem)
            elif fault is None or fault(self) is None:
                self.answer(name)

    def answer(
        self, name: str, change: Callable[[bytes], bytes] = bytes, pauses: tuple[float, ...] = ()
    ) -> bool:
        """An object's range; its bytes changed, or sent in parts with a pause before each."""
        content = self.server.objects.get(name)
        if content is None:
            self.refuse(404, "NoSuchKey")
            return True
        version = f'"{hashlib.md5(content).hexdigest()}"'
        if self.headers.get("If-Match", version) != version:
            self.refuse(412, "PreconditionFailed")
            return True
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        body = content[first : last + 1]
        if not body:
            self.refuse(416, "InvalidRange")
            return True
        self.send_response(206)
        self.send_header("ETag", version)
        self.send_header("x-oss-request-id", "R1")
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = change(body)
        step = -(-len(sent) // max(1, len(pauses)))
        for number, pause_s in enumerate(pauses or (0.0,)):
            time.sleep(pause_s)
            self.wfile.write(sent[number * step : (number + 1) * step])
        if len(sent) < len(body):
            self.close_connection = True
        return True

    def _problem(self) -> str | None:
        """What is wrong with who asks."""
        token = self.headers.get("x-oss-security-token")
        is_valid = self.server.token_is_valid and self.server.token in {None, token}
        if token is not None and not is_valid:
            return "SecurityTokenExpired"
        said = self.headers["Authorization"]
        v4 = said.startswith("OSS4-HMAC-SHA256 ")
        date = self.headers["x-oss-date" if v4 else "Date"]
        stamp = (
            time.mktime(time.strptime(date, "%Y%m%dT%H%M%SZ")) - time.timezone
            if v4
            else parsedate_to_datetime(date).timestamp()
        )
        if abs(stamp - time.time() - self.server.clock_s) > MAX_SKEW_S:
            return "RequestTimeTooSkewed"
        if KEY not in said:
            return "InvalidAccessKeyId"
        wanted = self._v4(date) if v4 else self._v1()
        return None if wanted in said else "SignatureDoesNotMatch"

    def _oss_headers(self) -> list[tuple[str, str]]:
        named = [(k.lower(), v) for k, v in self.headers.items()]
        return sorted((k, v) for k, v in named if k.startswith("x-oss-"))

    def _v1(self) -> str:
        headers = "".join(f"{k}:{v}\n" for k, v in self._oss_headers())
        name = unquote(urlsplit(self.path).path)
        text = f"GET\n\n\n{self.headers['Date']}\n{headers}{name}"
        digest = hmac.new(SECRET.encode(), text.encode(), hashlib.sha1).digest()
        return f"OSS {KEY}:{base64.b64encode(digest).decode()}"

    def _v4(self, date: str) -> str:
        scope = f"{date[:8]}/{REGION}/oss/aliyun_v4_request"
        headers = "".join(f"{k}:{v}\n" for k, v in self._oss_headers())
        path = quote(unquote(urlsplit(self.path).path), safe="/~")
        request = f"GET\n{path}\n\n{headers}\n\nUNSIGNED-PAYLOAD"
        hashed = hashlib.sha256(request.encode()).hexdigest()
        text = f"OSS4-HMAC-SHA256\n{date}\n{scope}\n{hashed}"
        key = f"aliyun_v4{SECRET}".encode()
        for part in scope.split("/"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
        return f"Credential={KEY}/{scope}, Signature={signature}"

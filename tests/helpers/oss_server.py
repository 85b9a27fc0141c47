"""A server on the loopback that speaks OSS as far as GET goes: signatures, tokens, clocks, limits.

Written from the protocol and beside oss2, so what it proves is that the two agree; no server of
Alibaba's has been asked.
"""

import base64
import contextlib
import hashlib
import hmac
import time
from collections import deque
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit

from triptych.tests.helpers.object_server import (
    MAX_SKEW_S,
    SECRET,
    ObjectHandler,
    ObjectServer,
    running,
)

KEY, TOKEN = "AKID-for-tests", "token-for-tests"
REGION = "cn-hangzhou"


class OssServer(ObjectServer):
    """Refuses by rate, by its clock and by tokens too."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.per_second: int | None = None
        self.clock_s = 0.0
        """What the server's clock is ahead."""
        self.token_is_valid = True
        self.token: str | None = None
        """The only one that is valid, where it is given."""
        self._recent: deque[float] = deque()

    def is_over_limit(self) -> bool:
        """Counts a request."""
        now = time.monotonic()
        with self.lock:
            while self._recent and self._recent[0] < now - 1:
                self._recent.popleft()
            if self.per_second is None or len(self._recent) < self.per_second:
                self._recent.append(now)
                return False
            return True


@contextlib.contextmanager
def serving() -> Iterator[OssServer]:
    """A server, until the end of the block."""
    server = OssServer()
    with running(server):
        yield server


def environment(endpoint: str) -> dict[str, str]:
    """What a person exports to read from a server."""
    keys = {"OSS_ACCESS_KEY_ID": KEY, "OSS_ACCESS_KEY_SECRET": SECRET}
    return {"OSS_ENDPOINT": endpoint, **keys}


class _Handler(ObjectHandler):
    server: OssServer
    every_answer_has: ClassVar = {"x-oss-request-id": "R1"}

    def problem(self) -> tuple[int, str] | None:
        if self.server.is_over_limit():
            return 503, "TotalQpsLimitExceeded"
        return (403, code) if (code := self._refusal()) else None

    def _refusal(self) -> str | None:
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

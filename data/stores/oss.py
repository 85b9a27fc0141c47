"""Shards in Alibaba Cloud OSS, by its client oss2, with the patience that a long run needs.

    oss://bucket/prefix       OSS_ENDPOINT names the endpoint, OSS_REGION (cn-hangzhou) chooses
                              signature V4, which newer accounts need; V1 without it
    OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET, OSS_SESSION_TOKEN (of STS)
    OSS_CREDENTIALS_FILE      in place of these; read anew whenever it is replaced

Each request waits for its turn (``request_rate``); one that takes longer than most is made twice
(``hedging``), and while nothing is answered one thread asks (``breaker``). What may pass is tried
again with full jitter for ``PATIENCE_S``; a body that breaks off goes on where it ended, of the
same version of the object (If-Match). oss2 itself neither retries a GET nor compares what it got;
hashes are the caller's.
"""

import logging
import os
import random
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import urllib3
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay

from triptych.data.stores.breaker import Breaker
from triptych.data.stores.hedging import Hedge
from triptych.data.stores.object_errors import cut_object, replaced_object
from triptych.data.stores.request_rate import RequestRate
from triptych.errors import ConfigError, StorageError

PATIENCE_S = 300.0
"""How long one read is tried. Below the 600 s that other ranks wait in a collective."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
TIMEOUTS_S = (5.0, 20.0)
"""To connect; between two arrivals of bytes."""
SLOW_AFTER_S, SLOW_BYTES_PER_S = 20.0, 16_384
"""A body that comes in slower, after so long, is asked for anew."""
MAX_CONNECTIONS = 64
_TOO_LATE = "  -> bring it back and type the command again: training resumes"
_REFUSALS = {
    "InvalidAccessKeyId": "there is no such key  -> set OSS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the key's secret is wrong  -> set OSS_ACCESS_KEY_SECRET",
    "SecurityTokenExpired": "the token of STS has expired  -> set OSS_SESSION_TOKEN, and its keys",
    "InvalidSecurityToken": "the token of STS is wrong  -> set OSS_SESSION_TOKEN, and its keys",
    "RequestTimeTooSkewed": "the clock of this node is wrong  -> set it, as by NTP",
    "AccessDenied": "the key may not read it  -> grant oss:GetObject on it",
    "NoSuchKey": "there is no such object  -> copy the shard there, or set data.sources.*.shards",
    "NoSuchBucket": "there is no such bucket  -> set data.sources.*.shards",
}
"""Code of an answer that waiting does not change -> what it means, and what to do."""
_OLD_KEYS = ("InvalidAccessKeyId", "SecurityTokenExpired", "InvalidSecurityToken")
"""What waiting may change where a file has the keys."""
CREDENTIALS_FILE = "OSS_CREDENTIALS_FILE"


class _TransientError(Exception):
    """It may pass."""

    def __init__(self, told: str, wait_s: float = 0.0) -> None:
        super().__init__(told)
        self.wait_s = wait_s


@dataclass(slots=True)
class _Part:
    """What there is of a range, or of the rest of it, and of which version of the object."""

    body: bytearray = field(default_factory=bytearray)
    version: str = ""
    broke_off: str = ""
    """Why there is no more; empty where all came."""


@dataclass(slots=True)
class _Mine:
    """What a process has for itself: connections, threads and locks do not outlive a fork."""

    process_id: int
    bucket: Any
    breaker: Breaker
    hedge: Hedge


class OssStore:
    """Objects below a prefix of a bucket (``data.stores.media_store.Store``)."""

    def __init__(self, url: str, requests_per_s: float) -> None:
        """Asks nothing yet.

        Args:
            url: ``oss://bucket/prefix``.
            requests_per_s: of all processes of this node together.

        Raises:
            ConfigError: endpoint or keys are not set.
        """
        parts = urlsplit(url)
        self._bucket_name, self._prefix = parts.netloc, parts.path.strip("/")
        keys = ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET")
        self._keys_are_renewed = bool(os.environ.get(CREDENTIALS_FILE))
        needed = ("OSS_ENDPOINT", *(() if self._keys_are_renewed else keys))
        if missing := [name for name in needed if not os.environ.get(name)]:
            raise ConfigError(
                f"{url} cannot be read: the environment has no {', '.join(missing)}"
                f"  -> export {missing[0]}=..."
            )
        self._endpoint = os.environ["OSS_ENDPOINT"]
        self._rate = RequestRate(f"{self._endpoint}/{self._bucket_name}", requests_per_s)
        self._lock = threading.Lock()
        self._held: _Mine | None = None

    def path(self, name: str) -> str:
        """The object's URL."""
        return f"oss://{self._bucket_name}/{self._key(name)}"

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of an object from ``offset`` on.

        Raises:
            DataError: the object ends before, or was replaced meanwhile.
            StorageError: it is refused, or cannot be reached and waiting did not help.
        """
        got = _Part()
        try:
            for attempt in Retrying(
                stop=stop_after_delay(PATIENCE_S),
                wait=_wait_s,
                retry=retry_if_exception_type(_TransientError),
                reraise=True,
            ):
                with attempt:
                    if len(got.body) < size:
                        self._read_on(name, offset, size, got)
        except _TransientError as error:
            raise StorageError(f"{self.path(name)} cannot be read: {error}{_TOO_LATE}") from None
        return bytes(got.body)

    def _read_on(self, name: str, offset: int, size: int, got: _Part) -> None:
        """Ask for what is missing; twice, where it takes longer than most (``hedging.py``)."""
        mine = self._mine()
        ask = partial(self._ask, name, offset, size, got.version, len(got.body))
        with mine.breaker.turn():
            self._rate.take()
            try:
                part = mine.hedge.first(ask, self._rate.take)
            except _TransientError:
                mine.breaker.failed()
                raise
            mine.breaker.answered()
        got.body += part.body
        got.version = part.version
        if part.broke_off:
            raise _TransientError(part.broke_off)

    def _ask(self, name: str, offset: int, size: int, version: str, had: int) -> _Part:
        """One request for what comes after the first ``had`` bytes; another thread may ask too."""
        from oss2.exceptions import RequestError, ServerError

        wanted = {"x-oss-range-behavior": "standard"}  # or a range outside brings the whole object
        if version:
            wanted["If-Match"] = version
        span = (offset + had, offset + size - 1)
        try:
            answer = self._mine().bucket.get_object(
                self._key(name), byte_range=span, headers=wanted
            )
        except ServerError as error:
            self._answer(name, offset, size, error)
        except RequestError as error:
            raise _TransientError(f"no answer ({type(error.exception).__name__})") from None
        part, response = _Part(version=answer.headers.get("ETag", "")), answer.resp.response
        if answer.status != 206 or answer.content_length != size - had:
            response.close()
            raise cut_object(self.path(name), offset, size) from None
        try:
            _fill(part.body, size - had, response.raw)
        except (urllib3.exceptions.HTTPError, OSError, EOFError) as error:
            told = f"after {had + len(part.body)} of {size} bytes ({type(error).__name__})"
            part.broke_off = f"its body broke off {told}"
        finally:
            if len(part.body) < size - had:
                response.close()
        response.raw.drain_conn()  # nothing is left: the connection is free for others
        return part

    def _answer(self, name: str, offset: int, size: int, error: Any) -> NoReturn:
        """What an answer that is no object means."""
        url, code = self.path(name), error.code or f"HTTP {error.status}"
        if error.status >= 500 or error.status == 429:
            delay_ms = error.headers.get("x-oss-qos-delay-time", "0")
            wait_s = int(delay_ms) / 1000 if delay_ms.isdecimal() else 0.0
            if wait_s:
                self._rate.hold(wait_s)
            raise _TransientError(f"{code} (request {error.request_id})", wait_s) from None
        if error.status == 412:
            raise replaced_object(url) from None
        if error.status == 416:
            raise cut_object(self.path(name), offset, size) from None
        if self._keys_are_renewed and code in _OLD_KEYS:
            raise _TransientError(f"{code}: {CREDENTIALS_FILE} holds keys that have expired")
        told = _REFUSALS.get(code, "OSS refuses it  -> the request's id tells its support why")
        raise StorageError(
            f"{url} cannot be read: {code} (request {error.request_id}): {told}"
        ) from None

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _mine(self) -> _Mine:
        """Of this process, made by the first thread that asks."""
        with self._lock:
            if self._held is None or self._held.process_id != os.getpid():
                bucket = self._connect()
                self._held = _Mine(os.getpid(), bucket, Breaker(), Hedge())
            return self._held

    def _connect(self) -> Any:
        import oss2
        from oss2.credentials import EnvironmentVariableCredentialsProvider

        from triptych.data.stores.oss_credentials import FileCredentials

        logging.getLogger("oss2").setLevel(logging.CRITICAL)  # it logs signed headers
        region, file = os.environ.get("OSS_REGION"), os.environ.get(CREDENTIALS_FILE)
        keys = FileCredentials(Path(file)) if file else EnvironmentVariableCredentialsProvider()
        auth = oss2.ProviderAuthV4 if region else oss2.ProviderAuth
        return oss2.Bucket(
            auth(keys),
            self._endpoint,
            self._bucket_name,
            region=region,
            connect_timeout=TIMEOUTS_S,
            session=oss2.Session(pool_size=MAX_CONNECTIONS),
        )


def _fill(body: bytearray, size: int, raw: Any) -> None:
    """Read until there are ``size`` bytes.

    Raises:
        EOFError: the body ends before.
        TimeoutError: it drips.
    """
    started, had = time.monotonic(), len(body)
    while len(body) < size:
        chunk = raw.read1(min(1 << 16, size - len(body)))
        if not chunk:
            raise EOFError
        body += chunk
        elapsed_s = time.monotonic() - started
        if elapsed_s > SLOW_AFTER_S and len(body) - had < elapsed_s * SLOW_BYTES_PER_S:
            raise TimeoutError


def _wait_s(state: RetryCallState) -> float:
    """Full jitter, after what the server has asked for."""
    longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (state.attempt_number - 1))
    error = state.outcome.exception() if state.outcome else None
    asked_s = error.wait_s if isinstance(error, _TransientError) else 0.0
    return asked_s + random.uniform(0, longest)

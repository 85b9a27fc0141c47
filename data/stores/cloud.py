"""Shards in S3, Google Cloud Storage and Azure, by obstore (``pip install 'triptych[cloud]'``).

    s3://bucket/prefix        AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL
    gs://bucket/prefix        GOOGLE_SERVICE_ACCOUNT, or the machine's own account
    az://container/prefix     AZURE_STORAGE_ACCOUNT_NAME, with AZURE_STORAGE_ACCOUNT_KEY, or
                              AZURE_STORAGE_SAS_TOKEN, or the machine's own account

obstore itself tries again what may pass, with jitter, for ``PATIENCE_S``. Each range waits for its
turn (``request_rate``); its repetitions do not. Its threads do not outlive a fork.
"""

import re
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

from triptych.data.stores.object_errors import cut_object, replaced_object
from triptych.data.stores.request_rate import RequestRate
from triptych.errors import ConfigError, StorageError

SCHEMES = ("s3", "gs", "az")
PATIENCE_S = 300.0
"""How long one read is tried. Below the 600 s that other ranks wait in a collective."""
FIRST_WAIT_S, LONGEST_WAIT_S, MOST_TRIES = 0.2, 20.0, 100
_ANSWER = re.compile(r"status code: (\d{3}[^:]*): .*?<Code>(\w+)</Code>", re.DOTALL)
_REFUSED = re.compile(r"(^|status code: )(400|401|403) |token request|/latest/api/token")
"""The last two: obstore found no keys, and asked the machine for an account of its own in vain."""


class CloudStore:
    """Objects below a prefix of a bucket (``data.stores.media_store.Store``)."""

    def __init__(self, url: str, requests_per_s: float) -> None:
        """Asks nothing yet.

        Args:
            url: of one of ``SCHEMES``.
            requests_per_s: of all processes of this node together.

        Raises:
            ConfigError: obstore is not installed, or the environment lacks what it needs.
        """
        try:
            from obstore.exceptions import BaseError
        except ImportError:
            raise ConfigError(
                f"{url} is read by obstore, which is not installed"
                "  -> pip install 'triptych[cloud]'"
            ) from None
        self._url = url.rstrip("/")
        self._rate = RequestRate(self._url.split("/")[2], requests_per_s)
        try:
            self._client = self._connect(MOST_TRIES)
        except BaseError as error:
            raise ConfigError(
                f"{url} cannot be read: {_told(error)}  -> docs/object-storage.md lists variables"
            ) from None

    def path(self, name: str) -> str:
        """The object's URL."""
        return f"{self._url}/{name}"

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of an object from ``offset`` on.

        Raises:
            DataError: the object ends before, or was replaced meanwhile.
            StorageError: it is refused, or cannot be reached and waiting did not help.
        """
        from obstore import get
        from obstore.exceptions import BaseError

        self._rate.take()
        version = None
        try:
            answer = get(self._client, name, options={"range": (offset, offset + size)})
            version = answer.meta["e_tag"]
            data = bytes(answer.bytes())  # where the body breaks off, the rest of this version
        except (BaseError, OSError) as error:
            self._explain(name, offset, size, version, error)
        if len(data) != size:
            raise cut_object(self.path(name), offset, size) from None
        return data

    def _explain(
        self, name: str, offset: int, size: int, version: str | None, error: Exception
    ) -> NoReturn:
        """What an error means."""
        told = _told(error)
        remedy = "bring it back and type the command again: training resumes"
        if isinstance(error, FileNotFoundError):
            remedy = "copy the shard there, or set data.sources.*.shards"
        elif _REFUSED.search(told):
            remedy = "docs/object-storage.md has the keys to export; they must be allowed to read"
        elif version or "416 " in told:
            self._compare(name, offset, size, version)
        raise StorageError(f"{self.path(name)} cannot be read: {told}  -> {remedy}") from None

    def _compare(self, name: str, offset: int, size: int, version: str | None) -> None:
        """Refuse an object that is too short or has changed, for which obstore has no error.

        It is asked for once: others wait for this read as long as ``PATIENCE_S`` already.
        """
        from obstore import head
        from obstore.exceptions import BaseError

        with suppress(BaseError, OSError):
            found = head(self._connect(0), name)
            if found["size"] < offset + size:
                raise cut_object(self.path(name), offset, size) from None
            if version not in {None, found["e_tag"]}:
                raise replaced_object(self.path(name)) from None

    def _connect(self, max_retries: int) -> Any:
        from obstore.store import from_url

        first, longest = timedelta(seconds=FIRST_WAIT_S), timedelta(seconds=LONGEST_WAIT_S)
        return from_url(
            self._url,
            # http is used only where AWS_ENDPOINT_URL or its like says so, as for MinIO
            client_options={"connect_timeout": "5s", "timeout": "60s", "allow_http": True},
            retry_config={
                "max_retries": max_retries,
                "retry_timeout": timedelta(seconds=PATIENCE_S),
                "backoff": {"init_backoff": first, "max_backoff": longest, "base": 2},
            },
        )


def _told(error: Exception) -> str:
    """Status and code of an answer; the rest of it may have the request as it was signed.

    Of other errors the first line: what follows it is for obstore's own developers, and long.
    """
    text = str(error)
    if answer := _ANSWER.search(text):
        return "{} ({})".format(*answer.groups())
    return text.partition("\n")[0]

"""Shards in S3, Google Cloud Storage and Azure, by obstore (``pip install 'triptych[cloud]'``).

    s3://bucket/prefix        AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL
    gs://bucket/prefix        GOOGLE_SERVICE_ACCOUNT, or the machine's own account
    az://container/prefix     AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY

obstore itself tries again what may pass, with jitter, for ``PATIENCE_S``. Each range waits for its
turn (``request_rate``); its repetitions do not. Its threads do not outlive a fork.
"""

from datetime import timedelta
from typing import Any, NoReturn

from triptych.data.stores.cut_object import cut_object
from triptych.data.stores.request_rate import RequestRate
from triptych.errors import ConfigError, StorageError

SCHEMES = ("s3", "gs", "az")
PATIENCE_S = 300.0
"""How long one read is tried. Below the 600 s that other ranks wait in a collective."""
FIRST_WAIT_S, LONGEST_WAIT_S, MOST_TRIES = 0.2, 20.0, 100


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
            from obstore.store import from_url
        except ImportError:
            raise ConfigError(
                f"{url} is read by obstore, which is not installed"
                "  -> pip install 'triptych[cloud]'"
            ) from None
        self._url = url.rstrip("/")
        self._rate = RequestRate(self._url.split("/")[2], requests_per_s)
        first, longest = timedelta(seconds=FIRST_WAIT_S), timedelta(seconds=LONGEST_WAIT_S)
        try:
            self._client = from_url(
                self._url,
                # http is used only where AWS_ENDPOINT_URL or its like says so, as for MinIO
                client_options={"connect_timeout": "5s", "timeout": "60s", "allow_http": True},
                retry_config={
                    "max_retries": MOST_TRIES,
                    "retry_timeout": timedelta(seconds=PATIENCE_S),
                    "backoff": {"init_backoff": first, "max_backoff": longest, "base": 2},
                },
            )
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
            DataError: the object ends before.
            StorageError: it is refused, or cannot be reached and waiting did not help.
        """
        from obstore import get_range
        from obstore.exceptions import BaseError

        self._rate.take()
        try:
            data = bytes(get_range(self._client, name, start=offset, length=size))
        except (BaseError, OSError) as error:
            self._explain(name, offset, size, error)
        if len(data) != size:
            raise cut_object(self.path(name), offset, size) from None
        return data

    def _explain(self, name: str, offset: int, size: int, error: Exception) -> NoReturn:
        """What an error means: obstore has no type for a range that lies outside."""
        from obstore import head
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        remedy = "bring it back and type the command again: training resumes"
        if isinstance(error, FileNotFoundError):
            remedy = "copy the shard there, or set data.sources.*.shards"
        elif isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
            remedy = "docs/object-storage.md has the keys to export; they must be allowed to read"
        else:
            try:
                is_cut = head(self._client, name)["size"] < offset + size
            except (BaseError, OSError):
                is_cut = False
            if is_cut:
                raise cut_object(self.path(name), offset, size) from None
        raise StorageError(
            f"{self.path(name)} cannot be read: {_told(error)}  -> {remedy}"
        ) from None


def _told(error: Any) -> str:
    """The first line: what follows it is for obstore's own developers, and long."""
    return str(error).partition("\n")[0]

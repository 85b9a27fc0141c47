"""Where the bytes of media lie: one way to read them, whatever the place.

    /mnt/data/chat/shards           a folder of a local or parallel file system
    file:///mnt/data/chat/shards    the same
    oss://bucket/prefix             Alibaba Cloud OSS; docs/object-storage.md
    s3://, gs://, az://             S3, Google Cloud Storage, Azure; the same page

A new place is a class with ``read`` and a row in ``_PLACES``. What any place needs, as waiting for
one that is gone, wraps a store and is one.
"""

import os
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from triptych.data.stores.cloud import SCHEMES, CloudStore
from triptych.data.stores.local import LocalStore
from triptych.data.stores.retrying import RetryingStore
from triptych.errors import ConfigError


class Store(Protocol):
    """Files by name. Threads and forks may share it."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on.

        Raises:
            DataError: the file ends before.
            StorageError: the place cannot be reached, and waiting did not help. Not the sample's
                fault, so a run stops instead of training on without it.
        """


def open_store(url: str, requests_per_s: float = inf) -> Store:
    """The store of a folder; nothing is read yet.

    Args:
        url: a path, or a URL of a scheme that is known.
        requests_per_s: to an object storage, of all processes of the job.

    Raises:
        ConfigError: the scheme is not known; names those that are.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return RetryingStore(LocalStore(Path(url)))
    # Nodes share no file that is fast enough: each gets its part. torchrun says how many.
    per_node = requests_per_s / int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if scheme == "oss":
        from triptych.data.stores.oss import OssStore  # late: others do not pay for its client

        return OssStore(url, per_node)
    if scheme in SCHEMES:
        return CloudStore(url, per_node)
    if scheme not in _PLACES:
        known = ", ".join(f"{known}://" for known in [*_PLACES, "oss", *SCHEMES])
        raise ConfigError(
            f"{url}: {scheme}:// is no place that data are read from; known are paths and {known}"
            "  -> copy the data to a file system, and name the folder"
        )
    return _PLACES[scheme](url)


def _open_file_url(url: str) -> Store:
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"}:
        raise ConfigError(
            f"{url} names a file on the host {parts.netloc}  -> file:///PATH has three slashes"
        )
    return RetryingStore(LocalStore(Path(unquote(parts.path))))


_PLACES: dict[str, Callable[[str], Store]] = {"file": _open_file_url}
"""Scheme -> what opens a URL of it."""

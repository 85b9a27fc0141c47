"""Where the bytes of media lie: one way to read them, whatever the place.

    /mnt/data/chat/shards           a folder of a local or parallel file system
    file:///mnt/data/chat/shards    the same

A new place is a class with ``read`` and a row in ``_PLACES``. What any place needs, as waiting for
one that is gone, wraps a store and is one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

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


def open_store(url: str) -> Store:
    """The store of a folder; nothing is read yet.

    Args:
        url: a path, or a URL of a scheme that is known.

    Raises:
        ConfigError: the scheme is not known; names those that are.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        return RetryingStore(LocalStore(Path(url)))
    if scheme not in _PLACES:
        known = ", ".join(f"{known}://" for known in _PLACES)
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

"""Waits for a place that cannot be reached, and tries again: a mount or a network may come back."""

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from triptych.errors import StorageError

PAUSES_S = (0.1, 1.0, 10.0, 60.0)
"""Between attempts."""


class Place(Protocol):
    """A store that raises ``OSError`` where it cannot be reached."""

    def path(self, name: str) -> str:
        """What people know a file by."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on."""


class RetryingStore:
    """A place, and patience (``data.stores.media_store.Store``)."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on.

        Raises:
            DataError: the file ends before; it would not grow if one waited.
            StorageError: the file is still missing or unreadable after the last pause.
        """
        return patiently(partial(self._place.read, name, offset, size), self._place.path(name))


def patiently(read: Callable[[], bytes], path: str) -> bytes:
    """What ``read`` returns, tried again after each pause where it raises ``OSError``.

    Args:
        read: the attempt.
        path: what people know the file by.

    Raises:
        StorageError: the last attempt failed as well.
    """
    for pause_s in PAUSES_S:
        try:
            return read()
        except OSError:
            time.sleep(pause_s)
    try:
        return read()
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror}  -> bring the folder "
            "back and type the command again: training resumes from its newest checkpoint"
        ) from error

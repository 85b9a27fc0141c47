"""Ranks of a real run that are slow in one kind of their own work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def slow_work(cause: str, sleep: Callable[[], None]) -> Iterator[None]:
    """Call ``sleep`` before each piece of this rank's work, as stragglers are told by it."""
    from triptych.checkpoints.background_save import BackgroundSave
    from triptych.data.loading.loader import Loader
    from triptych.parallel.zero.megatron import MegatronZero

    owner, name = {
        "compute": (MegatronZero, "zero_grad"),
        "data": (Loader, "__next__"),
        "checkpoint": (BackgroundSave, "begin"),
    }[cause]
    original = getattr(owner, name)

    def slowly(*args: Any, **options: Any) -> Any:
        sleep()
        return original(*args, **options)

    with mock.patch.object(owner, name, slowly):
        yield

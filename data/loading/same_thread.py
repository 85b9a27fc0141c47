"""What runs where there shall be no threads: work is done when it is given, by whoever gives it."""

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class SameThread(Executor):
    """Starts no thread. An error is raised where the work is given, and ends what follows it."""

    def __init__(self) -> None:
        self._is_over = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Does it now.

        Raises:
            RuntimeError: after ``shutdown``, as with threads.
        """
        if self._is_over:
            raise RuntimeError("cannot schedule new futures after shutdown")
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing is left to wait for, or to cancel."""
        self._is_over = True


def threads_or_none(num_threads: int, name: str) -> Executor:
    """So many threads that are called ``name``; of 0, the thread that asks."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix=name) if num_threads else SameThread()

"""A pool of one worker in this process."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from rewardgen.fleet.pool import Handle

T = TypeVar("T")


def _same(value: T) -> T:
    return value


class InlinePool:
    """Runs each call at once. The worker may share its policy with the learner, so nothing is copied.

    An exception of the worker is delivered by the future, as every pool does.
    """

    size = 1

    def __init__(self, worker: object) -> None:
        self.worker = worker
        self._closed = False

    def put(self, value: T) -> Handle[T]:
        """See `Pool.put`."""
        return Handle(partial(_same, value))

    def submit(self, method: str, *args: Any) -> Future[Handle[Any]]:
        """See `Pool.submit`."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        future: Future[Handle[Any]] = Future()
        values = [arg.get() if isinstance(arg, Handle) else arg for arg in args]
        try:
            future.set_result(self.put(getattr(self.worker, method)(*values)))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """See `Pool.close`."""
        self._closed = True

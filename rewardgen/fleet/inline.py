"""A pool of one worker in this process."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from rewardgen.fleet.payload import pack, unpack
from rewardgen.fleet.pool import Handle, Here
from rewardgen.types import Begun

T = TypeVar("T")


class _Later(Handle[T]):
    """A value in this process that is on its way."""

    def __init__(self, begun: Begun[T]) -> None:
        self._begun = begun
        self._found: list[T] = []

    def get(self) -> T:
        """See `Handle.get`."""
        if not self._found:
            self._found.append(self._begun.finish())
        return self._found[0]


class InlinePool:
    """Runs each call at once.

    An exception of the worker is delivered by the future, as every pool does. What a method only begins (`Begun`) is
    waited for when the handle's value is asked for: that may be long after, and is where its exceptions show.

    Args:
        worker: called by method name; it may share its policy with the learner. Its `give_up`, if it has one, is called
            when the pool is closed.
        copies: `put` copies tensors, as every other pool does. Without it they are the live ones, which is right, and
            free, as long as nothing that was put is used after the next update.
    """

    size = 1

    def __init__(self, worker: object, *, copies: bool = False) -> None:
        self.worker = worker
        self._copies = copies
        self._closed = False

    def put(self, value: T) -> Handle[T]:
        """See `Pool.put`."""
        return Here(unpack(pack(value)) if self._copies else value)

    def submit(self, method: str, *args: Any, about: str = "") -> Future[Handle[Any]]:
        """See `Pool.submit`."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        future: Future[Handle[Any]] = Future()
        values = [arg.get() if isinstance(arg, Handle) else arg for arg in args]
        try:
            made = getattr(self.worker, method)(*values)
            future.set_result(_Later(made) if isinstance(made, Begun) else Here(made))
        except Exception as error:
            future.set_exception(error)
        return future

    def figures(self) -> Mapping[str, float]:
        """None: all there is to say is the time of the rollouts, which the step reports."""
        return {}

    def close(self) -> None:
        """See `Pool.close`."""
        self._closed = True
        if (give_up := getattr(self.worker, "give_up", None)) is not None:
            give_up()

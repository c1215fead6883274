"""The pool contract: replicas of one worker, called by method name, whatever back end runs them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import Field

from rewardgen.settings import Settings

T = TypeVar("T")


class FleetConfig(Settings):
    """Where rollouts are drawn."""

    pool: Literal["inline"] = "inline"
    """`inline`: in the learner's own process, sharing its policy."""
    staleness: int = Field(default=0, ge=0, le=0)
    """How many updates the weights of a rollout may lag behind; inline rollouts always use the newest."""


@dataclass(frozen=True, slots=True)
class Handle(Generic[T]):
    """A value that is somewhere: here, or on another node until `get` is called."""

    fetch: Callable[[], T]

    def get(self) -> T:
        """Bring the value here."""
        return self.fetch()


class Pool(Protocol):
    """Replicas of one worker. Methods must be pure: any replica may run them, twice after a crash."""

    @property
    def size(self) -> int:
        """Number of replicas."""

    def put(self, value: T) -> Handle[T]:
        """Make a value available to all replicas once; pass the handle to `submit` in its place."""

    def submit(self, method: str, *args: Any) -> Future[Handle[Any]]:
        """Call `worker.method(*args)` on some replica, handles among the arguments replaced by their values."""

    def close(self) -> None:
        """Stop the replicas. Pending futures are cancelled."""

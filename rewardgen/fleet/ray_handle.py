"""Values in a cluster's object store, and what is passed to a worker in their place."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from rewardgen.fleet import cluster
from rewardgen.fleet.dispatch import Task
from rewardgen.fleet.payload import Packed, examples_in, pack, unpack
from rewardgen.fleet.pool import FleetConfig, FleetError, Handle
from rewardgen.reward import RewardWarning
from rewardgen.types import Example

T = TypeVar("T")


class Maker(Protocol):
    """What a handle needs of the pool that made it."""

    config: FleetConfig
    device: torch.device | None

    def first(self, task: Task) -> None:
        """Run a task before all that wait."""


class RayHandle(Handle[T]):
    """A value in the cluster's object store. Made by a `RayPool`.

    Args:
        pool: which made it.
        ref: where it is.
        examples: those of the request, which the value refers to.
        task: what it is the result of, and makes it anew should it be lost; None for what was put.
        told: what rewards warned of while it was made, on another machine; said again to whoever brings it here.
    """

    def __init__(
        self,
        pool: Maker,
        ref: Any,
        *,
        examples: Sequence[Example] = (),
        task: Task | None = None,
        told: Sequence[str] = (),
    ) -> None:
        self.ref = ref
        self.examples = examples
        self.task = task
        self.told = told
        self._pool = pool
        self._lock = threading.Lock()
        self._restoring: Future[Any] | None = None

    def get(self) -> T:
        """Bring the value here, made once more where its machine took it along.

        Raises:
            FleetError: it was lost time and again, or cannot be made again.
        """
        ray, config = cluster.load_ray(), self._pool.config
        for _ in range(config.max_tries):
            ref = self.ref
            try:
                packed = ray.get(ref, timeout=config.deadline_seconds)
            except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError) as error:
                reason = cluster.first_line(error)
                self.restore(ref).result()
            else:
                value: T = unpack(packed, self.examples, device=self._pool.device)
                for message in self.told:
                    warnings.warn(message, RewardWarning, stacklevel=2)
                return value
        raise FleetError(f"{self._about}: what came of it was lost {config.max_tries} times; the last: {reason}")

    def restore(self, lost: Any) -> Future[Any]:
        """Have the value made again. Done when `ref` is another one than `lost`."""
        with self._lock:
            if self._restoring is not None and not self._restoring.done():
                return self._restoring
            restored: Future[Any] = Future()
            if self.ref is not lost:
                restored.set_result(None)
                return restored
            if self.task is None:
                restored.set_exception(FleetError(f"{self._about}: it is lost, and only the learner could make it"))
                return restored
            self._restoring = restored
        again = self.task.anew()
        again.future.add_done_callback(partial(self._restored, restored))
        self._pool.first(again)
        return restored

    @property
    def _about(self) -> str:
        return self.task.name if self.task else "a value that was put into the object store"

    def _restored(self, restored: Future[Any], done: Future[RayHandle[T]]) -> None:
        if done.cancelled():
            restored.set_exception(FleetError(f"{self._about}: the pool was closed"))
        elif (error := done.exception()) is not None:
            restored.set_exception(error)
        else:
            self.ref = done.result().ref
            restored.set_result(None)


@dataclass(frozen=True, slots=True)
class Sent:
    """An argument of the learner's, packed once for all tries."""

    packed: Packed
    examples: Sequence[Example]

    @classmethod
    def of(cls, value: Any) -> Sent:
        """Pack a value; of a handle in this process, or of another back end, what it stands for."""
        found = value.get() if isinstance(value, Handle) else value
        return cls(pack(found), examples_in(found))


def wire(arg: RayHandle[Any] | Sent) -> Any:
    """What a worker is given for an argument; Ray brings it the value of a reference."""
    return arg.ref if isinstance(arg, RayHandle) else arg.packed


def attached(arg: RayHandle[Any] | Sent) -> Packed | None:
    """The examples that the value of a handle refers to, which it left out; None for what the learner packed."""
    return pack(list(arg.examples)) if isinstance(arg, RayHandle) else None

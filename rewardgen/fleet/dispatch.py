"""Who runs what: requests in order, to replicas that come and go. Pure state, without clock, threads or transport.

`ray_pool` moves it by what Ray says, `sim` by a virtual clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rewardgen.fleet.pool import FleetError

R = TypeVar("R", bound=Hashable)


@dataclass(eq=False, kw_only=True, slots=True)
class Task:
    """A request on its way: what to call, and how often that cost a replica."""

    method: str
    args: tuple[Any, ...]
    about: str = ""
    future: Future[Any] = field(default_factory=Future)
    tries: int = 0

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.about or self.method

    def anew(self) -> Task:
        """The same request, not yet made."""
        return Task(method=self.method, args=self.args, about=self.about)

    def claim(self) -> bool:
        """Whether it is still wanted; from now on it cannot be cancelled."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """End it with an error, unless it was cancelled or has ended."""
        if not self.future.done() and self.claim():
            self.future.set_exception(error)


@dataclass(kw_only=True, slots=True)
class _Call:
    task: Task | None
    since: float


class Dispatcher(Generic[R]):
    """Hands out tasks first come, first served; a task whose replica was lost goes first again.

    Args:
        max_tries: replicas that a task may cost before it fails.
        deadline_seconds: after which a call is overdue.
    """

    def __init__(self, *, max_tries: int, deadline_seconds: float) -> None:
        self.max_tries = max_tries
        self.deadline_seconds = deadline_seconds
        self.done = 0
        self.retries = 0
        self.busy_seconds = 0.0
        self._todo: deque[Task] = deque()
        self._free: deque[R] = deque()
        self._calls: dict[R, _Call] = {}

    @property
    def queue_depth(self) -> int:
        """Tasks that wait for a replica."""
        return len(self._todo)

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self._todo.append(task)

    def idle(self, replica: R) -> None:
        """A replica, new or back, has nothing to do."""
        self._free.append(replica)

    def assign(self, now: float) -> Iterator[tuple[R, Task]]:
        """Pairs of free replicas and waiting tasks, which run from now on. Cancelled tasks are dropped."""
        while self._todo and self._free:
            task = self._todo.popleft()
            if task.claim():
                replica = self._free.popleft()
                self._calls[replica] = _Call(task=task, since=now)
                yield replica, task

    def finish(self, replica: R, now: float) -> Task:
        """A replica is done with its task, whatever came of it, and free again. Returns the task."""
        call = self._calls.pop(replica)
        assert call.task is not None
        self._free.append(replica)
        self.busy_seconds += now - call.since
        self.done += 1
        return call.task

    def recall(self, now: float) -> list[R]:
        """All free replicas, which get nothing to do until `alive` is called. They too have a deadline for that.

        After a loss others may be gone as well, and a task should not have to find that out one by one.
        """
        recalled = list(self._free)
        self._free.clear()
        self._calls |= {replica: _Call(task=None, since=now) for replica in recalled}
        return recalled

    def alive(self, replica: R) -> None:
        """One that was recalled is there."""
        del self._calls[replica]
        self._free.append(replica)

    def lose(self, replica: R, reason: str) -> None:
        """A replica is gone for good. What it was at is done again, unless it has cost `max_tries` of them."""
        if replica in self._free:
            self._free.remove(replica)
        call = self._calls.pop(replica, None)
        task = None if call is None else call.task
        if task is not None and self.may_try_again(task, f"each worker that tried it was lost; the last: {reason}"):
            self.first(task)

    def may_try_again(self, task: Task, verdict: str) -> bool:
        """Count a try that came to nothing; where it was the last one the task fails with the verdict."""
        task.tries += 1
        if task.tries < self.max_tries:
            self.retries += 1
            return True
        times = f"after {task.tries} tries" if task.tries > 1 else "at the first try"
        task.fail(FleetError(f"{task.name} failed {times}: {verdict}"))
        return False

    def first(self, task: Task) -> None:
        """Queue a task before all others."""
        self._todo.appendleft(task)

    def overdue(self, now: float) -> list[R]:
        """Replicas that have not answered within the deadline."""
        return [replica for replica, call in self._calls.items() if now - call.since >= self.deadline_seconds]

    def next_deadline(self) -> float | None:
        """When the first call now running becomes overdue."""
        return min((call.since + self.deadline_seconds for call in self._calls.values()), default=None)

    def end(self, error: BaseException | None = None) -> None:
        """No more: waiting and running tasks fail with the error, or are cancelled where there is none."""
        left = [*self._todo, *(call.task for call in self._calls.values() if call.task is not None)]
        self._todo.clear()
        self._calls.clear()
        self._free.clear()
        for task in left:
            # One that runs cannot be cancelled.
            if error is not None or not task.future.cancel():
                task.fail(error or FleetError(f"{task.name}: the pool was closed"))

"""A pool on a virtual clock: what a fleet would do, and how long it would take, in no time.

The same `Dispatcher` hands out the requests and the same `Ahead` asks for them as on a real cluster; only what takes
time is replaced by saying how long it takes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rewardgen.fleet.dispatch import Dispatcher, Task
from rewardgen.fleet.pool import Handle, Here, then
from rewardgen.fleet.schedule import Ahead

T = TypeVar("T")

Seconds = Callable[[int, str, tuple[Any, ...]], float]
"""`(replica, method, args) -> seconds` that a call takes."""


class VirtualClock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, instant: float, act: Callable[[], None]) -> None:
        """Have something happen at an instant, after all that was to happen there before."""
        heapq.heappush(self._events, (max(instant, self.now), next(self._order), act))

    def sleep(self, seconds: float) -> None:
        """Let time pass; others go on."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self._next()
        self.now = end

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let time pass until something is so. Raises RuntimeError where nothing is left that could make it so."""
        while not condition():
            if not self._events:
                raise RuntimeError(f"nothing happens any more after {self.now:g} s: this would be waited for forever")
            self._next()

    def _next(self) -> None:
        self.now, _, act = heapq.heappop(self._events)
        act()


class SimFuture(Future[Any]):
    """A future for which waiting lets virtual time pass."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def result(self, timeout: float | None = None) -> Any:
        """See `Future.result`; `timeout` has no meaning here."""
        self._clock.wait(self.done)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `Future.exception`; `timeout` has no meaning here."""
        self._clock.wait(self.done)
        return super().exception(0)


@dataclass(frozen=True, eq=False, slots=True)
class _Replica:
    """One life of a replica; after a loss it has another."""

    index: int


class SimPool:
    """Replicas that take the time they are said to take.

    Args:
        clock: shared with whoever waits.
        size: number of replicas.
        seconds: how long a call takes.
        worker: called for the values; without it every value is None.
        losses: (instant, replica) in order of time: it is lost then. One that is already gone stays so.
        restart_seconds: until a lost one is back.
        max_tries: as in `FleetConfig`.
    """

    def __init__(
        self,
        clock: VirtualClock,
        *,
        size: int,
        seconds: Seconds,
        worker: object | None = None,
        losses: Iterable[tuple[float, int]] = (),
        restart_seconds: float = 0.0,
        max_tries: int = 3,
    ) -> None:
        self.size = size
        self._clock = clock
        self._seconds = seconds
        self._worker = worker
        self._restart_seconds = restart_seconds
        self._dispatcher: Dispatcher[_Replica] = Dispatcher(max_tries=max_tries, deadline_seconds=float("inf"))
        self._up: dict[int, _Replica] = {}
        self._lost = 0
        self._closed = False
        for index in range(size):
            self._start(index)
        self._expect(iter(losses))

    def put(self, value: T) -> Handle[T]:
        """See `Pool.put`."""
        return Here(value)

    def submit(self, method: str, *args: Any, about: str = "") -> Future[Handle[Any]]:
        """See `Pool.submit`."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        task = Task(method=method, args=args, about=about, future=SimFuture(self._clock))
        self._dispatcher.submit(task)
        self._assign()
        return task.future

    def figures(self) -> Mapping[str, float]:
        """See `Pool.figures`; all since the start, `busy_share` of all replicas and all the time."""
        return {
            "workers": float(len(self._up)),
            "queue_depth": float(self._dispatcher.queue_depth),
            "retries": float(self._dispatcher.retries),
            "lost_workers": float(self._lost),
            "busy_share": self._dispatcher.busy_seconds / max(self._clock.now * self.size, 1e-9),
        }

    def close(self) -> None:
        """See `Pool.close`."""
        self._closed = True
        self._up.clear()
        self._dispatcher.end()

    def _assign(self) -> None:
        for replica, task in self._dispatcher.assign(self._clock.now):
            end = self._clock.now + self._seconds(replica.index, task.method, task.args)
            self._clock.at(end, partial(self._finish, replica))

    def _finish(self, replica: _Replica) -> None:
        if self._up.get(replica.index) is not replica:  # lost before it was done
            return
        task = self._dispatcher.finish(replica, self._clock.now)
        values = [arg.get() if isinstance(arg, Handle) else arg for arg in task.args]
        try:
            task.future.set_result(Here(self._worker and getattr(self._worker, task.method)(*values)))
        except Exception as error:
            task.fail(error)
        self._assign()

    def _start(self, index: int) -> None:
        if not self._closed:
            self._up[index] = replica = _Replica(index)
            self._dispatcher.idle(replica)
            self._assign()

    def _expect(self, losses: Iterator[tuple[float, int]]) -> None:
        """Wait for the next loss only: there may be infinitely many."""
        following = next(losses, None)
        if following is not None and not self._closed:
            instant, index = following
            self._clock.at(instant, partial(self._lose, index, losses))

    def _lose(self, index: int, losses: Iterator[tuple[float, int]]) -> None:
        replica = self._up.pop(index, None)
        if replica is not None:
            self._lost += 1
            self._dispatcher.lose(replica, f"it was lost after {self._clock.now:g} s")
            self._clock.at(self._clock.now + self._restart_seconds, partial(self._start, index))
        self._expect(losses)
        self._assign()


_NO_WEIGHTS: Any = None


class _Unmeasured:
    """A clock of phases that nobody asks."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


def step_seconds(
    pool: SimPool,
    clock: VirtualClock,
    *,
    num_steps: int,
    requests_per_step: int,
    staleness: int,
    learner_seconds: float,
    weights_seconds: float = 0.0,
    judges: SimPool | None = None,
    judged_per_step: int = 0,
) -> list[float]:
    """How long each step of a run would take on a pool.

    Args:
        pool: draws.
        clock: the pool's.
        num_steps: length of the run.
        requests_per_step: micro-batches drawn for each step.
        staleness: as in `FleetConfig`.
        learner_seconds: from having a step's rollouts to its update.
        weights_seconds: of the learner, to make new weights available.
        judges: score some of what is drawn, worker to judge.
        judged_per_step: so many of a step's micro-batches, the last ones.
    """

    def put(weights: Any) -> Handle[Any]:
        clock.sleep(weights_seconds)
        return pool.put(weights)

    def submit(step: int, weights: Handle[Any]) -> list[Future[Handle[Any]]]:
        drawn = [pool.submit("rollout", step, weights) for _ in range(requests_per_step)]
        if judges is None or not judged_per_step:
            return drawn
        scored = [then(future, partial(judges.submit, "score")) for future in drawn[-judged_per_step:]]
        return [*drawn[:-judged_per_step], *scored]

    ahead: Ahead[int] = Ahead(
        put=put,
        plan=lambda step: step,
        needs_weights=lambda step: True,
        submit=submit,
        publish=lambda: _NO_WEIGHTS,
        staleness=staleness,
        num_steps=num_steps,
    )
    ends = [0.0]
    for step in range(num_steps):
        pending = ahead.ask(step, _Unmeasured())
        for future in pending.futures:
            clock.wait(future.done)
            future.result()
        clock.sleep(learner_seconds)
        ends.append(clock.now)
    return [end - begin for begin, end in itertools.pairwise(ends)]

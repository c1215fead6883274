"""A pool of workers on a Ray cluster.

One thread owns all state and acts on messages: a request, a worker that is up, an answer, a loss. Nothing is polled.
A worker that is lost, or killed because it overran its deadline, is replaced by a new actor, wherever there is room;
Ray itself restarts and retries nothing, so that what happens to a request is decided in one place (`Dispatcher`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from rewardgen.fleet import cluster
from rewardgen.fleet.dispatch import Dispatcher, Task
from rewardgen.fleet.payload import pack
from rewardgen.fleet.pool import FleetConfig, FleetError, Handle
from rewardgen.fleet.ray_handle import RayHandle, Sent, attached, wire
from rewardgen.fleet.replica import Place, Replica, Surroundings, versions

T = TypeVar("T")

_FAREWELL_SECONDS = 10.0
"""How long closing waits for the thread."""


class RemoteError(Exception):
    """The cause of an error that a worker raised: its traceback there."""


@dataclass(eq=False, slots=True)
class _Member:
    """One actor, from its request to its end. Another actor is another member."""

    actor: Any
    place: Place | None = None

    @property
    def up(self) -> bool:
        """Whether its worker is made."""
        return self.place is not None


class RayPool:
    """Workers on a Ray cluster, each in a process of its own.

    Args:
        factory: makes the worker, in its process. It travels by pickle: a function of an importable module, or a
            dataclass of plain data.
        config: how many workers, and the patience with them.
        needs: what each reserves.
        section: of the experiment, which asks for them.
        beside: other workers of this run, which must have room on the cluster as well.
        device: where `Handle.get` puts tensors.

    Raises:
        ConfigError: Ray is missing, there is no such cluster, or it has no room for the workers.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        config: FleetConfig,
        *,
        needs: cluster.Needs | None = None,
        section: str = "fleet",
        beside: cluster.Group | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.size = config.workers
        self.needs = needs or cluster.Needs(cpus=config.cpus_per_worker, gpus=config.gpus_per_worker or 0.0)
        self._group = cluster.Group(section=section, number=config.first_workers, needs=self.needs)
        self.device = device
        self._connected = cluster.connect(config.address)
        try:
            cluster.require_room(self._group, beside)
        except BaseException:
            self._disconnect()
            raise
        self._ray = cluster.load_ray()
        self._actor = self._ray.remote(Replica).options(
            num_cpus=self.needs.cpus,
            num_gpus=self.needs.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        self._factory = self._ray.put(factory)
        self._surroundings = Surroundings.here(config.threads_per_worker)
        self._dispatcher: Dispatcher[_Member] = Dispatcher(
            max_tries=config.max_tries, deadline_seconds=config.deadline_seconds
        )
        self._members: set[_Member] = set()
        self._alone_since: float | None = time.monotonic()
        self._died_starting = 0
        self._lost = 0
        self._reported = (time.monotonic(), 0, 0.0)
        self._error: BaseException | None = None
        self._closing = False
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()

    # --- the contract ------------------------------------------------------------------------------------------------

    def put(self, value: T) -> Handle[T]:
        """See `Pool.put`."""
        return RayHandle(self, self._ray.put(pack(value)))

    def submit(self, method: str, *args: Any, about: str = "") -> Future[Handle[Any]]:
        """See `Pool.submit`."""
        if self._closing:
            raise RuntimeError("the pool is closed")
        values = tuple(arg if isinstance(arg, RayHandle) else Sent.of(arg) for arg in args)
        task = Task(method=method, args=values, about=about)
        self._inbox.put(partial(self._accept, task))
        return task.future

    def figures(self) -> Mapping[str, float]:
        """See `Pool.figures`: retries and lost workers since the start, the rest since the last call."""
        done, busy, now = self._dispatcher.done, self._dispatcher.busy_seconds, time.monotonic()
        then, done_then, busy_then = self._reported
        self._reported = (now, done, busy)
        workers = len(self.places())
        worker_seconds = max((now - then) * max(workers, 1), 1e-9)
        return {
            "workers": float(workers),
            "queue_depth": float(self._dispatcher.queue_depth),
            "retries": float(self._dispatcher.retries),
            "lost_workers": float(self._lost),
            "requests_per_worker_second": (done - done_then) / worker_seconds,
            "busy_share": min(1.0, (busy - busy_then) / worker_seconds),
        }

    def places(self) -> list[Place]:
        """Where the workers are that are up."""
        return [member.place for member in tuple(self._members) if member.place is not None]

    def grow(self, number: int) -> None:
        """Add workers. They take part as soon as the cluster has room for them and they are up."""
        self.size += number
        self._inbox.put(partial(self._hire, number))

    def close(self) -> None:
        """See `Pool.close`. Ray itself ends too where this pool started it."""
        if not self._closing:
            self._closing = True
            self._inbox.put(lambda: None)
            self._thread.join(_FAREWELL_SECONDS)
            self._disconnect()

    def first(self, task: Task) -> None:
        """Run a task before all that wait: what it makes was there already."""
        if self._closing:
            task.fail(FleetError("the pool is closed"))
        else:
            self._inbox.put(partial(self._accept, task, first=True))

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._hire(self.config.workers)
            while not self._closing:
                with contextlib.suppress(queue.Empty):
                    self._inbox.get(timeout=self._patience())()
                self._look_at_the_clock()
                self._assign()
        except BaseException as fault:  # nobody may wait for an answer that cannot come
            error = fault
        finally:
            self._error = error or FleetError("the pool is closed")
            self._dispatcher.end(error)
            for member in tuple(self._members):
                self._kill(member)
            self._members.clear()
            while not self._closing:  # requests to a pool that has failed
                self._inbox.get()()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._inbox.get_nowait()()

    def _accept(self, task: Task, *, first: bool = False) -> None:
        if self._error is not None:
            task.fail(self._error)
        elif first:
            self._dispatcher.first(task)
        else:
            self._dispatcher.submit(task)

    def _hire(self, number: int = 1) -> None:
        if self._error is not None:
            return
        for _ in range(number):
            member = _Member(self._actor.remote(self._surroundings))
            self._members.add(member)
            self._when_done(member.actor.start.remote(self._factory), partial(self._started, member))

    def _when_done(self, ref: Any, act: Callable[[Future[Any]], None]) -> None:
        """Call `act` in the thread once a call is done. The callback itself runs in one of Ray's."""
        ref.future().add_done_callback(lambda done: self._inbox.put(partial(act, done)))

    def _started(self, member: _Member, done: Future[Any]) -> None:
        if member not in self._members:
            return
        error = done.exception()
        if isinstance(error, self._ray.exceptions.RayTaskError):
            raise _cause(error)
        if error is not None:
            self._died_starting += 1
            if self._died_starting >= self.config.max_tries:
                raise FleetError(f"{self._died_starting} workers in a row died while they started; the last: {error}")
            self._replace(member, cluster.first_line(error))
            return
        place: Place = done.result()
        if place.versions != versions():
            theirs, ours = _in_words(place.versions), _in_words(versions())
            raise FleetError(f"{place} has {theirs}, but the learner has {ours}: install the same there")
        self._died_starting, self._alone_since, member.place = 0, None, place
        self._dispatcher.idle(member)

    def _assign(self) -> None:
        for member, task in self._dispatcher.assign(time.monotonic()):
            try:
                call = member.actor.call.options(num_returns=2)
                ok, out = call.remote(task.method, list(map(attached, task.args)), *map(wire, task.args))
            except Exception as error:  # an argument that cannot be sent, say
                self._dispatcher.finish(member, time.monotonic()).fail(error)
            else:
                self._when_done(ok, partial(self._answered, member, out))

    def _answered(self, member: _Member, out: Any, done: Future[Any]) -> None:
        if member not in self._members:  # it was killed because it was late
            return
        error, now = done.exception(), time.monotonic()
        if error is None:
            task = self._dispatcher.finish(member, now)
            examples = [example for arg in task.args for example in arg.examples]
            # Not the task itself: with its future, which holds the handle, it would keep the payload for long.
            task.future.set_result(RayHandle(self, out, examples=examples, task=task.anew(), told=done.result()))
        elif isinstance(error, self._ray.exceptions.ObjectLostError):  # comes as a RayTaskError too
            self._restore(self._dispatcher.finish(member, now), error)
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            cause = _cause(error)
            self._dispatcher.finish(member, now).fail(cause)
        else:
            self._replace(member, cluster.first_line(error))

    def _restore(self, task: Task, error: Any) -> None:
        """Have the lost arguments of a task made again, and then run it again."""
        handles = [arg for arg in task.args if isinstance(arg, RayHandle)]
        lost = [handle for handle in handles if handle.ref.hex() == getattr(error, "object_ref_hex", None)] or handles
        if not self._dispatcher.may_try_again(task, f"an argument was lost: {cluster.first_line(error)}"):
            return
        left = [handle.restore(handle.ref) for handle in lost]

        def go_on(done: Future[Any]) -> None:
            left.remove(done)
            if (failed := done.exception()) is not None:
                task.fail(failed)
            elif not left and not task.future.done():
                self._accept(task, first=True)

        for restored in tuple(left):
            restored.add_done_callback(lambda done: self._inbox.put(partial(go_on, done)))

    def _replace(self, member: _Member, reason: str) -> None:
        self._lost += 1
        self._members.discard(member)
        self._kill(member)
        self._dispatcher.lose(member, f"{member.place}: {reason}" if member.place else reason)
        for other in self._dispatcher.recall(time.monotonic()):
            self._when_done(other.actor.ping.remote(), partial(self._pinged, other))
        if not any(other.up for other in self._members) and self._alone_since is None:
            self._alone_since = time.monotonic()
        self._hire()

    def _pinged(self, member: _Member, done: Future[Any]) -> None:
        if member not in self._members:
            return
        if (error := done.exception()) is None:
            self._dispatcher.alive(member)
        else:
            self._replace(member, cluster.first_line(error))

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for member in self._dispatcher.overdue(now):
            self._replace(member, f"it did not answer within {self.config.deadline_seconds:g} s")
        if self._alone_since is not None and now - self._alone_since >= self.config.start_timeout_seconds:
            raise cluster.nothing_came(self.config.start_timeout_seconds, self._group)

    def _patience(self) -> float | None:
        """Seconds until the clock matters; None as long as it does not."""
        instants = [self._dispatcher.next_deadline()]
        if self._alone_since is not None:
            instants.append(self._alone_since + self.config.start_timeout_seconds)
        due = [instant for instant in instants if instant is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _kill(self, member: _Member) -> None:
        with contextlib.suppress(Exception):  # it may be dead, or Ray gone
            self._ray.kill(member.actor, no_restart=True)

    def _disconnect(self) -> None:
        if self._connected:
            cluster.load_ray().shutdown()
            self._connected = False


def _cause(error: Any) -> BaseException:
    """The exception as the worker raised it, with its traceback there as its cause."""
    cause: BaseException = error.cause
    cause.__cause__ = RemoteError(f"\n{error}")
    return cause


def _in_words(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())

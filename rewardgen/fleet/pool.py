"""The pool contract: replicas of one worker, called by method name, whatever back end runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from pydantic import Field, model_validator

from rewardgen.errors import UserError
from rewardgen.settings import Settings, SparseSettings

T = TypeVar("T")
S = TypeVar("S")


class FleetError(UserError):
    """The fleet cannot do what it was asked for: no worker came up, or a request cost every worker that tried it."""


class JudgesConfig(Settings):
    """Who scores samples (`objective.policy_gradient`) where the fleet draws them. Each has all rewards that do."""

    workers: int = Field(default=1, ge=1)
    """Number of judges."""
    cpus_per_worker: float = Field(default=1.0, ge=0)
    """CPUs that each judge reserves."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs that each judge reserves: 0.5 shares one between two, 0 is for judges that only ask a service. Null: one
    where the learner has a GPU, else none."""


class FleetConfig(SparseSettings):
    """Where rollouts are drawn. In an experiment the word alone, `fleet: ray`, stands for `fleet: {pool: ray}`."""

    sparse: ClassVar[frozenset[str]] = frozenset(
        {"workers", "min_workers", "address", "cpus_per_worker", "gpus_per_worker", "threads_per_worker"}
        | {"deadline_seconds", "max_tries", "start_timeout_seconds", "judges"}
        | {"placement", "learners", "cpus_per_learner", "gpus_per_learner"}
    )

    pool: Literal["inline", "ray"] = "inline"
    """`inline`: in the learner's own process, sharing its policy. `ray`: by workers on a Ray cluster, each with a
    policy of its own; needs the extra `ray`."""
    staleness: int = Field(default=0, ge=0)
    """Updates by which the weights of a rollout lag behind: batch k is drawn with the weights after max(0, k - this)
    updates, always. It is also how many batches are drawn ahead while the learner works."""
    placement: Literal["colocated", "disaggregated"] | None = None
    """Who draws where. `colocated`: each learner for itself; with `pool: ray` the learners are processes on the
    cluster. `disaggregated`: workers with CPUs and GPUs of their own; a single learner is then the process that was
    started, several are on the cluster too. Null: as the pool has it, `inline` colocated and `ray` disaggregated."""
    learners: int = Field(default=1, ge=1)
    """Ray: processes that train together, each with its own micro-batches and its share of the workers."""
    cpus_per_learner: float = Field(default=1.0, ge=0)
    """Ray: CPUs that each learner on the cluster reserves."""
    gpus_per_learner: int | None = Field(default=None, ge=0, le=1)
    """Ray: GPUs that each learner on the cluster reserves. Null: one where the cluster has any and `train.device` is
    not `cpu`, else none."""
    workers: int = Field(default=1, ge=1)
    """Ray: number of workers."""
    min_workers: int | None = Field(default=None, ge=0)
    """Ray: workers that the cluster must have room for at the start; the others join when it grows. Null: all."""
    address: str | None = None
    """Ray: the cluster's address, as `host:6379` or `auto`. Null takes RAY_ADDRESS, or else starts Ray on this machine
    for the length of the run."""
    cpus_per_worker: float = Field(default=1.0, ge=0)
    """Ray: CPUs that each worker reserves."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """Ray: GPUs that each worker reserves. Null: one where the learner has a GPU, else none."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Ray: torch's threads in each worker or placed learner. Null: as many as the process that was started has; other
    numbers may round otherwise."""
    deadline_seconds: float = Field(default=1800.0, gt=0)
    """Ray: a worker that has not answered after so long is killed, and another one asked."""
    max_tries: int = Field(default=3, ge=1)
    """Ray: workers that one request may cost before the run stops with an error that names it; and how often in a row
    learners on the cluster may be lost without having come to another checkpoint."""
    start_timeout_seconds: float = Field(default=900.0, gt=0)
    """Ray: how long there may be no worker at all, or no room for the learners, before the run stops."""
    judges: JudgesConfig = JudgesConfig()
    """Ray: a pool of their own for the rewards that score samples. Threads, deadline, tries and patience are those
    above, and where `min_workers` is set no more judges than that must fit at the start either."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.address or "").startswith("ray://"):
            raise ValueError("address: a learner is part of its cluster and does not use Ray Client; give host:6379")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than workers, which is {self.workers}")
        if self.placement == "disaggregated" and self.pool == "inline":
            raise ValueError("placement is disaggregated, but pool: inline draws in the learner's process; use ray")
        if self.learners > 1 and (self.pool != "ray" or self.placement is None):
            raise ValueError(
                f"learners is {self.learners}, which are placed on a Ray cluster: set pool: ray, and placement:"
                " colocated (each draws for itself) or disaggregated"
            )
        if self.places_learners and not self.remote_rollouts and (self.workers > 1 or self.min_workers is not None):
            raise ValueError("workers: with placement colocated there are none; set learners, or leave out workers")
        if self.remote_rollouts and self.workers < self.learners:
            raise ValueError(f"workers is {self.workers}: each of {self.learners} learners needs one that draws for it")
        return self

    @property
    def first_workers(self) -> int:
        """Workers that the cluster must have room for at the start."""
        return self.workers if self.min_workers is None else self.min_workers

    def for_judges(self) -> FleetConfig:
        """The same cluster and the same patience, for the judges."""
        judges = self.judges.model_dump()
        fewest = None if self.min_workers is None else min(self.min_workers, self.judges.workers)
        return self.model_copy(update=judges | {"min_workers": fewest})

    @property
    def places_learners(self) -> bool:
        """Whether the learners themselves are processes on a Ray cluster."""
        return self.pool == "ray" and (self.placement == "colocated" or self.learners > 1)

    @property
    def remote_rollouts(self) -> bool:
        """Whether rollouts are drawn in other processes than the learner's."""
        return self.pool == "ray" and self.placement != "colocated"


class Handle(ABC, Generic[T]):
    """A value that is somewhere: here, or on another machine until `get` is called."""

    @abstractmethod
    def get(self) -> T:
        """Bring the value here. Not for callbacks of a future: it may wait."""


@dataclass(frozen=True, slots=True)
class Here(Handle[T]):
    """A value in this process."""

    value: T

    def get(self) -> T:
        """See `Handle.get`."""
        return self.value


class Pool(Protocol):
    """Replicas of one worker. Methods must be pure: any replica may run them, twice after a crash."""

    @property
    def size(self) -> int:
        """Number of replicas."""

    def put(self, value: T) -> Handle[T]:
        """Make a value available to all replicas once; pass the handle to `submit` in its place."""

    def submit(self, method: str, *args: Any, about: str = "") -> Future[Handle[Any]]:
        """Call `worker.method(*args)` on some replica, handles among the arguments replaced by their values.

        A handle may be of another pool; its value then goes from worker to worker.

        Args:
            method: name of the worker's method.
            args: what it gets; tensors arrive as copies.
            about: what an error message calls the request.
        """

    def figures(self) -> Mapping[str, float]:
        """What there is to say about the pool since the last call: workers, queue depth, retries, throughput."""

    def close(self) -> None:
        """Stop the replicas. Pending futures are cancelled."""


def then(future: Future[T], submit: Callable[[T], Future[S]]) -> Future[S]:
    """The future of what `submit` makes of a future's result: `then(drawn, lambda h: judges.submit("score", h))`."""
    outcome: Future[S] = Future()
    outcome.set_running_or_notify_cancel()

    def pass_on(done: Future[S]) -> None:
        if done.cancelled():
            outcome.set_exception(FleetError("the pool was closed before the request was done"))
        elif (error := done.exception()) is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(done.result())

    def go_on(done: Future[T]) -> None:
        try:
            following = submit(done.result())
        except BaseException as error:
            outcome.set_exception(error)
        else:
            following.add_done_callback(pass_on)

    future.add_done_callback(go_on)
    return outcome

"""Drawing ahead: which batch is drawn with which weights, and when it is asked for.

Batch k uses the weights after max(0, k - staleness) updates, whatever the fleet does: it is asked for as soon as these
exist, and the learner takes the batches in order. So no more than `staleness` batches are ever drawn ahead, which is
all the back-pressure there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from rewardgen.fleet.pool import Handle

if TYPE_CHECKING:  # a plan runs this on a virtual clock, without torch
    from rewardgen.rollout import Weights

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending(Generic[Batch]):
    """A batch that was asked for, and the futures of what is drawn for it."""

    batch: Batch
    futures: Sequence[Future[Handle[Any]]]


class Phases(Protocol):
    """Who is told what took how long: a `Clock`."""

    def phase(self, name: str, /) -> AbstractContextManager[None]:
        """Take note of the block's duration."""


class Ahead(Generic[Batch]):
    """Asks for batches up to `staleness` steps ahead, and hands them out in order.

    Args:
        put: makes weights available to the workers (see `Pool.put`).
        plan: makes the batch of a step, a function of the step alone.
        needs_weights: whether anything is drawn for the batch of a step.
        submit: asks for all that is drawn for a batch, with the weights of the handle.
        publish: the present weights.
        staleness: updates by which the weights of a batch lag behind, at least 0.
        num_steps: nothing is asked for from this step on.
    """

    def __init__(
        self,
        *,
        put: Callable[[Weights], Handle[Weights]],
        plan: Callable[[int], Batch],
        needs_weights: Callable[[int], bool],
        submit: Callable[[Batch, Handle[Weights]], Sequence[Future[Handle[Any]]]],
        publish: Callable[[], Weights],
        staleness: int,
        num_steps: int,
    ) -> None:
        self.staleness = staleness
        self._put = put
        self._plan = plan
        self._needs_weights = needs_weights
        self._submit = submit
        self._publish = publish
        self._num_steps = num_steps
        self._next = 0
        self._pending: dict[int, Pending[Batch]] = {}
        self._published: dict[int, Handle[Weights]] = {}

    def ask(self, step: int, clock: Phases) -> Pending[Batch]:
        """Ask for what may be asked for now that `step` updates are done; returns the batch of this step.

        Steps come in order. After a jump, drawing starts anew from there.

        Args:
            step: updates done.
            clock: told what took how long: `data`, `weights`, and `rollout` where the pool draws at once.

        Raises:
            ValueError: after a jump, the older weights that a batch needs are not there.
        """
        if step not in self._pending and step != self._next:
            self._pending, self._next = {}, step
        # Also for batches past the end of the run, which may be resumed for longer.
        first = step + self.staleness if step else 0
        if any(self._needs_weights(number) for number in range(first, step + self.staleness + 1)):
            with clock.phase("weights"):
                self._published.setdefault(step, self._put(self._publish()))
        while self._next <= step + self.staleness and (self._next < self._num_steps or self._next == step):
            self._pending[self._next] = self._begin(self._next, clock)
            self._next += 1
        self._published = {k: handle for k, handle in self._published.items() if k > step - self.staleness}
        return self._pending.pop(step)

    def published(self) -> dict[int, Weights]:
        """The weights that batches of coming steps are drawn with, by the number of updates; a resumed run needs them.

        They are saved, and not what was drawn with them: they are there at once, while a batch may still be on its
        way, and they do not grow with it.
        """
        return {step: handle.get() for step, handle in self._published.items()}

    def restore(self, step: int, published: Mapping[int, Weights]) -> None:
        """Go on after `step` updates, with what `published` gave."""
        self._pending, self._next = {}, step
        self._published = {number: self._put(weights) for number, weights in published.items()}

    def _begin(self, step: int, clock: Phases) -> Pending[Batch]:
        with clock.phase("data"):
            batch = self._plan(step)
        if not self._needs_weights(step):
            return Pending(batch=batch, futures=())
        number = max(0, step - self.staleness)
        if number not in self._published:
            raise ValueError(f"step {step} is drawn with the weights after {number} updates, and these are gone")
        with clock.phase("rollout"):
            return Pending(batch=batch, futures=self._submit(batch, self._published[number]))

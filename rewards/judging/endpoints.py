"""Which endpoint takes the next call, and how many calls at a time each is given. No network here.

How many: additive increase, multiplicative decrease, as in TCP. Every success raises an endpoint's limit by
1 / limit, so by about one for each round of calls; a 429, a timeout or a server error halves it, once for the calls
that were under way at that time.

An endpoint whose calls fail several times in a row is left alone for a while, twice as long each time. The last one
that is left is never ejected: where all fail, it is for the share of failed scores to stop the run.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rewardgen.rewards.judging.client import Kind

_LONGEST_EJECTION = 16
"""An ejection lasts at most this many times the first one."""
_OVERLOAD: frozenset[Kind] = frozenset({"rate_limited", "timeout", "server_error"})


@dataclass(slots=True)
class Endpoint:
    """State of one endpoint; only `Endpoints` changes it."""

    url: str
    limit: float
    in_flight: int = 0
    failed_in_a_row: int = 0
    ejections: int = 0
    ejected_until: float = 0.0
    reduced_at: float = float("-inf")
    takes_logprobs: bool = True


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to make one call."""

    endpoint: Endpoint
    since: float = field(compare=False)


class Endpoints:
    """Hands out calls. Safe for threads.

    Args:
        urls: base URLs.
        concurrency: calls in flight at each endpoint: always so many, or with `adaptive` at most.
        adaptive: follow what the endpoint can take, beginning at half of `concurrency`.
        eject_after: failures in a row after which an endpoint is ejected; 429s are none.
        eject_s: length of its first ejection.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        concurrency: int,
        adaptive: bool,
        eject_after: int,
        eject_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        first = max(1.0, concurrency / 2) if adaptive else float(concurrency)
        self.all = [Endpoint(url, first) for url in urls]
        self._concurrency, self._adaptive = concurrency, adaptive
        self._eject_after, self._eject_s, self._clock = eject_after, eject_s, clock
        self._changed = threading.Condition()
        self.waiting: deque[object] = deque()
        """Those who wait for a place, the first one first."""

    def take(
        self, *, not_at: Endpoint | None = None, timeout_s: float = 0.0, stop: threading.Event | None = None
    ) -> Lease | None:
        """Wait for a free place, at another endpoint than `not_at` where one has any.

        Places are given in the order of asking. None after `timeout_s`, or soon after `stop` is set.
        """
        end, turn = time.monotonic() + timeout_s, object()
        with self._changed:
            self.waiting.append(turn)
            try:
                while stop is None or not stop.is_set():
                    now = self._clock()
                    free = [e for e in self.all if e.in_flight < int(e.limit) and e.ejected_until <= now]
                    if free and self.waiting[0] is turn:
                        chosen = min(free, key=lambda e: (e is not_at, e.in_flight / e.limit))
                        chosen.in_flight += 1
                        return Lease(chosen, now)
                    left = end - time.monotonic()
                    if left <= 0:
                        return None
                    # An ejection ends without anyone's notice.
                    self._changed.wait(min(left, 0.5))
                return None
            finally:
                self.waiting.remove(turn)
                self._changed.notify_all()  # somebody else is first now

    def succeeded(self, lease: Lease, *, refuses_logprobs: bool = False) -> None:
        """Give a place back after an answer, which came only without log-probabilities where `refuses_logprobs`."""
        with self._changed:
            endpoint = lease.endpoint
            endpoint.takes_logprobs &= not refuses_logprobs
            endpoint.in_flight -= 1
            endpoint.failed_in_a_row = endpoint.ejections = 0
            if self._adaptive:
                endpoint.limit = min(float(self._concurrency), endpoint.limit + 1 / endpoint.limit)
            self._changed.notify_all()

    def failed(self, lease: Lease, kind: Kind) -> None:
        """Give a place back after a failure."""
        with self._changed:
            endpoint, now = lease.endpoint, self._clock()
            endpoint.in_flight -= 1
            if self._adaptive and kind in _OVERLOAD and lease.since >= endpoint.reduced_at:
                endpoint.limit, endpoint.reduced_at = max(1.0, endpoint.limit / 2), now
            if kind != "rate_limited":
                endpoint.failed_in_a_row += 1
            others = any(e.ejected_until <= now for e in self.all if e is not endpoint)
            if endpoint.failed_in_a_row >= self._eject_after and others and endpoint.ejected_until <= now:
                endpoint.ejected_until = now + self._eject_s * min(2**endpoint.ejections, _LONGEST_EJECTION)
                endpoint.ejections += 1
                endpoint.failed_in_a_row = 0
            self._changed.notify_all()

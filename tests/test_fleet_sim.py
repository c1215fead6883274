"""The pool on a virtual clock: closed forms, faults, and the pool contract."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardgen.fleet.pool import FleetError
from rewardgen.fleet.sim import SimPool, VirtualClock, step_seconds


class Worker:
    def double(self, value: int) -> int:
        return value * 2

    def fail(self) -> None:
        raise KeyError("no")


def always(seconds: float) -> Any:
    return lambda *_: seconds


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.floats(0.1, 9))
def test_equal_tasks_take_as_many_rounds_as_it_needs(size: int, number: int, seconds: float) -> None:
    clock = VirtualClock()
    pool = SimPool(clock, size=size, seconds=always(seconds), worker=Worker())
    futures = [pool.submit("double", index) for index in range(number)]
    assert [future.result().get() for future in futures] == [2 * index for index in range(number)]
    assert clock.now == pytest.approx(math.ceil(number / size) * seconds)
    assert pool.figures()["busy_share"] == pytest.approx(number / (size * math.ceil(number / size)))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.lists(st.floats(0.1, 10), min_size=1, max_size=25))
def test_unequal_tasks_are_what_greedy_scheduling_makes_of_them(size: int, lengths: list[float]) -> None:
    """Brute force: each task in turn goes to the worker that is free first."""
    free = [0.0] * size
    for length in lengths:
        first = min(range(size), key=lambda worker: free[worker])
        free[first] += length
    clock = VirtualClock()
    pool = SimPool(clock, size=size, seconds=lambda replica, method, args: float(args[0]))
    for future in [pool.submit("work", length) for length in lengths]:
        future.result()
    assert clock.now == pytest.approx(max(free))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.floats(0.5, 5), st.floats(0.5, 20), st.integers(0, 3))
def test_seconds_per_step_with_and_without_drawing_ahead(
    size: int, requests: int, seconds: float, learner: float, staleness: int
) -> None:
    clock = VirtualClock()
    pool = SimPool(clock, size=size, seconds=always(seconds))
    found = step_seconds(
        pool,
        clock,
        num_steps=40,
        requests_per_step=requests,
        staleness=staleness,
        learner_seconds=learner,
        weights_seconds=0.25,
    )
    drawing = math.ceil(requests / size) * seconds
    if staleness == 0:
        assert found == pytest.approx([0.25 + drawing + learner] * 40)
        return
    # In the long run the slower of the two is always busy; what is drawn ahead only fills workers that would idle.
    steady = sum(found[20:]) / 20
    assert steady >= max(requests * seconds / size, learner + 0.25) * (1 - 1e-9) - drawing / 20
    assert steady <= max(drawing, learner + 0.25) + drawing / 20
    assert found[0] == pytest.approx(0.25 + drawing + learner)


def test_one_batch_ahead_hides_the_shorter_of_the_two() -> None:
    """Ideal pipelining of sleeping workers: 1 s of drawing and 1 s of learning take 1 s instead of 2."""
    for staleness, expected in ((0, 2.0), (1, 1.0)):
        clock = VirtualClock()
        pool = SimPool(clock, size=4, seconds=always(1.0))
        found = step_seconds(pool, clock, num_steps=10, requests_per_step=4, staleness=staleness, learner_seconds=1.0)
        assert found[1:] == pytest.approx([expected] * 9)


def test_a_lost_worker_costs_what_it_had_done_and_its_absence() -> None:
    clock = VirtualClock()
    pool = SimPool(clock, size=2, seconds=always(10), worker=Worker(), losses=[(4, 0)], restart_seconds=3)
    futures = [pool.submit("double", index) for index in range(3)]
    assert futures[0].result().get() == 0
    # Replica 0 dies at 4 and is back at 7; it begins the first task anew, and ends it at 17.
    assert clock.now == pytest.approx(17)
    assert futures[2].result().get() == 4
    assert clock.now == pytest.approx(20)
    figures = pool.figures()
    assert (figures["retries"], figures["lost_workers"], figures["workers"]) == (1, 1, 2)


def test_endless_losses_end_a_task_after_its_tries() -> None:
    clock = VirtualClock()
    losses = ((float(instant), 0) for instant in itertools.count(1))
    pool = SimPool(clock, size=1, seconds=always(10), losses=losses, max_tries=4)
    with pytest.raises(FleetError, match=r"the rollout of step 3 failed after 4 tries.*lost after 4 s"):
        pool.submit("work", about="the rollout of step 3").result()


def test_errors_of_the_worker_closing_and_waiting_forever() -> None:
    clock = VirtualClock()
    pool = SimPool(clock, size=1, seconds=always(1), worker=Worker())
    assert isinstance(pool.submit("fail").exception(), KeyError)
    running, waiting = pool.submit("double", 1), pool.submit("double", 2)
    pool.close()
    assert isinstance(running.exception(), FleetError)
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("double", 1)
    with pytest.raises(RuntimeError, match="waited for forever"):
        clock.wait(lambda: False)
    with pytest.raises(RuntimeError, match="waited for forever"):
        SimPool(VirtualClock(), size=0, seconds=always(1)).submit("work").result()
